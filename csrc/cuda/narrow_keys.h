// The key-centred side of narrow windows (narrow.h). Seen from a key, the queries around it are as keys are around a query, with
// offsets the other way round. But near borders, where windows are shifted inward, up to 10 x 10 queries see a key, and of whole
// classes up to 8 x 8.
#pragma once

#include "narrow_frame.h"
#include "narrow_numbers.h"

namespace natten_ext::cuda {

// Which queries see the keys of a group, wherever it is: units of two blocks of eight, on a row of the map or of whole
// classes on two.
template <class M, class Tile>
struct KeyFrame {
  using Group = NarrowGroup<Tile, true>;
  static constexpr bool Whole = Tile::kWhole;
  static constexpr int kColumnBlocks = Whole ? 1 : 2, kRowBlocks = Whole ? 2 : 1;  // of a unit
  static constexpr int kUnitSlots = Whole ? 16 : Tile::kColumns;
  static constexpr int kWholeUnits = 4;
  // Copies of the table, with offsets the other way round: in each, rows are minus infinity from which keys of one kind are not
  // seen: those that are among the first of their column, and those that are among the last.
  static constexpr int kCopies = 4;

  int units;
  uint32_t slot;  // of the first position
  int top;        // row of the map
  int begin[2], end[2];          // rows of queries that see the group's upper and lower keys
  bool valid[kColumnBlocks][2];  // whether queries in the lane's columns see its keys
  Shared entries[2][kColumnBlocks][2];  // of upper and lower keys and those columns, in the frame's first row

  NATTEN_EXT_DEVICE static bool first(int key) { return key < kNarrowKernel; }
  NATTEN_EXT_DEVICE static bool last(int key, int length) { return key >= length - kNarrowKernel; }
  NATTEN_EXT_DEVICE static int begin_of(int key) { return first(key) ? 0 : key - Tile::kReach; }
  NATTEN_EXT_DEVICE static int end_of(int key, int length) { return last(key, length) ? length : key + Tile::kReach + 1; }

  NATTEN_EXT_DEVICE KeyFrame(const Tile& tile, const Group& group) {
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      begin[h] = begin_of(group.y + h);
      end[h] = end_of(group.y + h, tile.height);
    }
    top = Whole ? 0 : begin[0];
    units = Whole ? kWholeUnits : (group.y + 1 < group.end_y ? end[1] : end[0]) - top;  // for the group's own keys
    slot = group.frame_from(tile, top);
    const int lane = static_cast<int>(narrow_lane()), x = lesser(group.x + lane / 4, group.width - 1);
    const int from = begin_of(x), count = end_of(x, group.width) - from, left = Whole ? 0 : group.x - Tile::kReach;
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 2 * kColumnBlocks; ++i) {
      const int b = i / 2, c = i % 2, query = left + 8 * b + lane % 4 * 2 + c;
      valid[b][c] = inside(query - from, count);
      const int entry = valid[b][c] ? query - x + kNarrowKernel - 1 : Tile::kTableExtent;
      NATTEN_EXT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int key = group.y + h, copy = (first(key) ? 0 : 2) + (last(key, tile.height) ? 1 : 0);
        const int row = copy * (Tile::kTableExtent + 1) + top - key + kNarrowKernel - 1;
        entries[h][b][c] = Tile::kTable + (row * Tile::kTableRow + entry) * static_cast<Shared>(sizeof(float));
      }
    }
  }
  // Away from borders all keys are seen by 7 x 7 queries: then the group's frame is that of queries at the same place.
  NATTEN_EXT_DEVICE static bool is_plain(const Tile& tile, const Group& group) {
    return !Whole && !first(group.y) && !last(group.y + 1, tile.height) && !first(group.x) && !last(group.x + 7, group.width);
  }
  // Whether queries in block b of a unit see keys of row h of the group.
  NATTEN_EXT_DEVICE bool has(int unit, int b, int h) const {
    const int row = top + unit * kRowBlocks + (Whole ? b : 0);
    return row >= begin[h] && row < end[h];
  }
  NATTEN_EXT_DEVICE bool valid_column(int b, int c) const { return valid[Whole ? 0 : b][c]; }
  NATTEN_EXT_DEVICE Shared entry(int unit, int b, int h, int c) const {
    const int row = unit * kRowBlocks + (Whole ? b : 0);
    return entries[h][Whole ? 0 : b][c] + row * Tile::kTableRow * static_cast<Shared>(sizeof(float));
  }

  // A barrier must follow. The row past a copy's last one is minus infinity; the first copy needs none before its first.
  NATTEN_EXT_DEVICE static void fill_tables(const NarrowParams& p, int head) {
    using Element = typename M::Element;
    for_each_table_entry<Tile, Tile::kTableExtent + 1>([&](uint32_t i) {
      const int y = i / Tile::kTableRow, x = i % Tile::kTableRow, down = y - kNarrowKernel + 1;
      const float value = narrow_table_entry<Element, Tile>(p, head, Tile::kTableExtent - 1 - y, Tile::kTableExtent - 1 - x);
      NATTEN_EXT_UNROLL
      for (int copy = 0; copy < kCopies; ++copy) {
        const bool seen = (copy < 2 || down >= -Tile::kReach) && (copy % 2 != 0 || down <= Tile::kReach);
        store_shared(Tile::kTable + copy * Tile::kTableBytes + i * static_cast<Shared>(sizeof(float)), seen ? value : -kInfinity<float>);
      }
    });
  }
};

// The key-centred side of the backward; `Second`: of the double backward, which has cotangents too. `Early`: once
// a group's own rows are in registers, the next group's are on their way; so results leave by room of their own.
template <class M, class TileType, bool Second, bool Early>
struct NarrowKeys {
  using Element = typename M::Element;
  using Tile = TileType;
  using Group = NarrowGroup<Tile, true>;
  using Columns = FrameColumns<Tile>;
  using Frame = KeyFrame<M, Tile>;
  using Results = FrameResults<Tile>;
  using Sums = FrameSums<M, Tile, false>;
  using Numbers = NumberParts<Element>;
  static constexpr bool Whole = Tile::kWhole, kTableGradient = false;
  static constexpr int kRowNumbers = Second ? 8 : 4, kOwnTensors = Second ? 4 : 2, kOwnRooms = kOwnTensors + Early;
  // Behind the tables: what picks numbers, the numbers of the staged queries, their cotangents, and a warp's own rows, of a group at a time.
  static constexpr Shared kPicks = Tile::kTable + Frame::kCopies * Tile::kTableBytes, kNumbers = kPicks + 128;
  static constexpr Shared kMoreNumbers = kNumbers + Tile::kSlots * sizeof(Numbers), kCotQueries = kMoreNumbers + (Second ? kMoreNumbers - kNumbers : 0);
  static constexpr Shared kOwn = kCotQueries + (Second ? (Tile::kSlots + 8) * Tile::kBytes : 0);
  static_assert((kOwn - Tile::kOwn) % Tile::kBytes == 0);
  static constexpr uint32_t kShared = kOwn + Tile::kWarps * kOwnRooms * kWarpRows * Tile::kBytes;

  PickingLeft<M, Tile> key, value, cot_value;
  NarrowLeft<M, Tile> cot_key;
  Sums grad_key, grad_value, first;  // `first`: of the cotangents of queries, which go to grad_key's results

  NATTEN_EXT_DEVICE static uint32_t own_slot(int tensor) {
    return (kOwn - Tile::kOwn) / Tile::kBytes + (narrow_thread() / kWarp * kOwnRooms + tensor) * kWarpRows;
  }
  NATTEN_EXT_DEVICE static uint32_t result_slot() { return own_slot(Early ? kOwnTensors : 0); }

  NATTEN_EXT_DEVICE static void run_keys(const NarrowParams& p) {
    const int head = p.head[narrow_launch_head(p)];
    const Tile tile(p, head, narrow_block_of_head(p));
    if (!tile.exists) return;
    if constexpr (Second) {
      stage_narrow_halo<Tile::kChunks>(p, tile, {&p.query, &p.grad_output, &p.cot_query}, {Tile::kKeys, Tile::kValues, kCotQueries}, p.head_bytes);
    } else {
      stage_narrow_halo<Tile::kChunks>(p, tile, {&p.query, &p.grad_output}, {Tile::kKeys, Tile::kValues}, p.head_bytes);
    }
    ByteRows more = p.row_numbers;
    more.data += sizeof(Numbers);
    if constexpr (Second) stage_narrow_halo<1>(p, tile, {&p.row_numbers, &more}, {kNumbers, kMoreNumbers}, sizeof(Numbers));
    else stage_narrow_halo<1>(p, tile, {&p.row_numbers}, {kNumbers}, sizeof(Numbers));
    Frame::fill_tables(p, head);
    if (const uint32_t i = narrow_thread(); i < 8) store_shared(kPicks + 4 * i, Numbers::picking(i / 4));
    if (Early) stage_own(p, tile, 0);
    NATTEN_EXT_NO_UNROLL
    for (int i = 0; i < Tile::kGroups; ++i) {
      const Group group(p, tile, i);
      if (!Early) stage_own(p, tile, i);
      copy_async_wait<0>();
      if (i == 0) sync_block();
      else sync_warp();
      NarrowKeys gradients;
      if (!group.empty()) gradients.load();
      if (Early && i + 1 < Tile::kGroups) {
        sync_warp();
        stage_own(p, tile, i + 1);
      }
      if (group.empty()) continue;
      if (Frame::is_plain(tile, group)) gradients.attend(p, group, Columns(group));
      else gradients.template attend_units<false>(p, Frame(tile, group));
      const auto finish = [&](const Tile& tile, const Group& group) {
        // Zero times NaN is NaN: as in `with_care`.
        if (any_in_warp(!all_finite(gradients.grad_key.acc) || !all_finite(gradients.grad_value.acc))) {
          gradients.template attend_units<true>(p, Frame(tile, group));
        }
        gradients.write(p, tile, group);
      };
      if constexpr (Tile::kDim == 32) {  // where computing them again saves registers
        const Tile again(p, head, forget(narrow_block_of_head(p)));
        finish(again, Group(p, again, forget(i)));
      } else {
        finish(tile, group);
      }
    }
  }

  NATTEN_EXT_DEVICE void load() {
    key.load(own_slot(0), kPicks);
    value.load(own_slot(1), kPicks + 16);
    if constexpr (Second) {
      cot_key.load(own_slot(2));
      cot_value.load(own_slot(3), kPicks + 16);
    }
  }
  // Starts the copies of a group's own rows.
  NATTEN_EXT_DEVICE static void stage_own(const NarrowParams& p, Tile tile, int i) {
    const Group group(p, tile, i);
    if (group.empty()) return copy_async_commit();
    if (Tile::kDim == 32) tile.head = forget(tile.head), tile.batch = forget(tile.batch);  // so that no addresses are kept
    group.stage(p, tile, p.key, own_slot(0));
    group.stage(p, tile, p.value, own_slot(1));
    if constexpr (Second) {
      group.stage(p, tile, p.cot_key, own_slot(2));
      group.stage(p, tile, p.cot_value, own_slot(3));
    }
    copy_async_commit();
  }

  NATTEN_EXT_DEVICE void write(const NarrowParams& p, const Tile& tile, const Group& group) const {
    if (p.grad_key.data != nullptr) group.template write<Element>(grad_key.acc, {p.scale, p.scale}, p, tile, p.grad_key, result_slot());
    if (p.grad_value.data != nullptr) group.template write<Element>(grad_value.acc, {1, 1}, p, tile, p.grad_value, result_slot());
  }

  // Staged queries, and what comes with them, as right operands of products. Both numbers of dP and G come with rows of grad_output.
  template <int Blocks>
  struct Staged {
    using Rows = NumberedRows<Tile, Blocks>;
    Rows queries, grad_outputs, cot_queries, more;
    NATTEN_EXT_DEVICE explicit Staged(uint32_t frame)
        : queries(Tile::kKeys, kNumbers, frame), grad_outputs(Tile::kValues, kNumbers, frame), cot_queries(kCotQueries, kMoreNumbers, frame),
          more(Tile::kValues, kMoreNumbers, frame) {}
    NATTEN_EXT_DEVICE void load(int row) {
      queries.load(row);
      grad_outputs.load_rows(row);
      if constexpr (Second) cot_queries.load(row);
      if constexpr (Second && Rows::kTogether) more.load(row);
    }
  };

  // What becomes of the products of pairs: weights of rows of grad_output in `s`, and of rows of queries and of their cotangents.
  struct Terms {
    float s[4], dp[4], x[4], g[4];

    NATTEN_EXT_DEVICE float (&of_query())[4] { return Second ? x : dp; }

    // Forms the products of own keys and the row of block b that is loaded. `Careful`: of them alone.
    template <bool Careful, int Blocks>
    NATTEN_EXT_DEVICE Terms(const NarrowKeys& keys, const Staged<Blocks>& staged, int b, std::bool_constant<Careful>) {
      using Rows = NumberedRows<Tile, Blocks>;
      const auto form = [&](float (&c)[4], const PickingLeft<M, Tile>& left, const Rows& rows, const Rows& numbers) {
        const auto word = [&](int chunk) { return rows.word(b, chunk); };
        NATTEN_EXT_UNROLL
        for (float& sum : c) sum = 0;
        if constexpr (Careful) left.multiply_rows(c, word);
        else left.multiply_rows_and_number(c, numbers.number(b), word);
      };
      constexpr bool kTogether = Rows::kTogether;
      form(s, keys.key, staged.queries, staged.queries);
      form(dp, keys.value, staged.grad_outputs, kTogether ? staged.grad_outputs : staged.queries);
      if constexpr (Second) {
        form(x, keys.key, staged.cot_queries, staged.cot_queries);
        keys.cot_key.multiply_rows(x, [&](int chunk) { return staged.queries.word(b, chunk); });
        form(g, keys.cot_value, kTogether ? staged.more : staged.grad_outputs, kTogether ? staged.more : staged.cot_queries);
      }
    }
    // Both blocks folded into one.
    NATTEN_EXT_DEVICE void fold(const Terms& second, const Columns& columns) {
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (!columns.second[e % 2]) continue;
        s[e] = second.s[e], dp[e] = second.dp[e];
        if constexpr (Second) x[e] = second.x[e], g[e] = second.g[e];
      }
    }
    // Of products less what is taken off them.
    NATTEN_EXT_DEVICE void finish(int e, const NarrowParams& p, float entry) {
      finish(e, power_of_two(fused_multiply_add(s[e], p.scale * kLog2E<float>, entry)), Second ? x[e] * p.scale : 0);
    }
    // Of products with the query in slot `query`.
    NATTEN_EXT_DEVICE void finish_carefully(int e, const NarrowParams& p, float entry, uint32_t query) {
      const Numbers numbers = load_shared<Numbers>(kNumbers + query * sizeof(Numbers));
      const float factor = p.scale * kLog2E<float>;
      float weight, deviation = 0;
      if (numbers.is_exact()) {
        weight = weight_of(fused_multiply_add(s[e], factor, entry), numbers.exact(0), numbers.exact(1));
        dp[e] -= numbers.exact(2);
      } else {
        weight = power_of_two(fused_multiply_add(s[e] + numbers.number(0), factor, entry));
        dp[e] += numbers.number(1);
      }
      if constexpr (Second) {
        const Numbers more = load_shared<Numbers>(kMoreNumbers + query * sizeof(Numbers));
        deviation = more.is_exact() ? fused_multiply_add(x[e], p.scale, -more.exact(0)) : (x[e] + more.number(0)) * p.scale;
        g[e] += more.is_exact() ? -more.exact(1) : more.number(1);
      }
      finish(e, weight, deviation);
    }
    NATTEN_EXT_DEVICE void mask(int e) { s[e] = dp[e] = x[e] = kMasked<float>; }

   private:
    NATTEN_EXT_DEVICE void finish(int e, float weight, float deviation) {
      const float difference = dp[e];
      s[e] = weight;
      dp[e] = product_of(weight, difference);
      if constexpr (Second) {
        x[e] = product_of(weight, fused_multiply_add(deviation, difference, g[e]));
        s[e] = product_of(weight, deviation);
      }
    }
  };

  NATTEN_EXT_DEVICE void clear_all() {
    grad_key.clear_all();
    grad_value.clear_all();
    first.clear_all();
  }

  // The walk of the query-centred side, which has no spills with code of its own only.
  NATTEN_EXT_DEVICE void attend(const NarrowParams& p, const Group& group, const Columns& columns) {
    float lower[2] = {-kInfinity<float>, -kInfinity<float>};  // entries for the lower keys
    if (!group.lower) columns.load_entries(lower, 0);
    Staged<2> staged(group.frame);
    Results query_rows(Tile::kKeys, group.frame), grad_output_rows(Tile::kValues, group.frame), cot_query_rows(kCotQueries, group.frame);
    clear_all();
    NATTEN_EXT_UNROLL
    for (int r = 0; r < Group::kFrameRows; ++r) {
      if (r == kNarrowKernel && !group.lower) continue;
      staged.load(r);
      float upper[2] = {0, 0};
      if (r < kNarrowKernel) columns.load_entries(upper, r + 1);
      Terms terms(*this, staged, 0, std::false_type{});
      terms.fold(Terms(*this, staged, 1, std::false_type{}), columns);
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2, c = e % 2;
        if (Group::may_have(r, h)) terms.finish(e, p, h ? lower[c] : upper[c]);
        else terms.s[e] = terms.dp[e] = terms.x[e] = 0;
      }
      grad_value.add(grad_output_rows, r, terms.s, columns);
      grad_key.add(query_rows, r, terms.of_query(), columns);
      if constexpr (Second) first.add_to(grad_key.acc, cot_query_rows, r, terms.dp, columns);
      lower[0] = upper[0], lower[1] = upper[1];
      if ((kLoadsFarAhead || Tile::kDim == 32) && !Second && never(terms.s[0])) return;
      hold_back_loads();
    }
  }

  // The same for any frame. `Careful`: in ordinary arithmetic, which leaves out queries that do not see a key.
  template <bool Careful>
  NATTEN_EXT_DEVICE void attend_units(const NarrowParams& p, const Frame& frame) {
    constexpr int kUnroll = Whole && !Careful ? Frame::kWholeUnits : 1;
    Staged<2> staged(frame.slot);
    Results query_rows(Tile::kKeys, frame.slot), grad_output_rows(Tile::kValues, frame.slot), cot_query_rows(kCotQueries, frame.slot);
    constexpr int kAtATime = Results::kProductsAtATime;
    clear_all();
    NATTEN_EXT_UNROLL_BY(kUnroll)
    for (int from = 0; from < frame.units; from += kAtATime) {
      NATTEN_EXT_UNROLL
      for (int i = 0; i < kAtATime; ++i) {
        const int unit = from + i;
        if (!Whole && unit >= frame.units) break;
        staged.load(unit);
        float of_grad_output[2][4], of_query[2][4], of_cot_query[2][4];
        NATTEN_EXT_UNROLL
        for (int b = 0; b < 2; ++b) {
          Terms terms(*this, staged, b, std::bool_constant<Careful>{});
          NATTEN_EXT_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int h = e / 2, c = e % 2;
            const float entry = load_shared<float>(frame.entry(unit, b, h, c));
            const uint32_t query = frame.slot + unit * Frame::kUnitSlots + 8 * b + narrow_lane() % 4 * 2 + c;
            if (Careful) terms.finish_carefully(e, p, entry, query);
            else terms.finish(e, p, entry);
            if (Careful && !(frame.valid_column(b, c) && frame.has(unit, b, h))) terms.mask(e);
            of_grad_output[b][e] = terms.s[e], of_query[b][e] = terms.of_query()[e], of_cot_query[b][e] = terms.dp[e];
          }
          if constexpr (Careful) {
            const auto slot_of = [&](int column) { return frame.slot + unit * Frame::kUnitSlots + 8 * b + column; };
            grad_value.add_valid(Tile::kValues, terms.s, slot_of);
            grad_key.add_valid(Tile::kKeys, terms.of_query(), slot_of);
            if constexpr (Second) first.add_valid_to(grad_key.acc, kCotQueries, terms.dp, slot_of);
          }
        }
        if constexpr (!Careful) {
          if (i == 0) {
            query_rows.load(from);
            grad_output_rows.load(from);
            if constexpr (Second) cot_query_rows.load(from);
          }
          grad_value.add_blocks(grad_output_rows, i, of_grad_output);
          grad_key.add_blocks(query_rows, i, of_query);
          if constexpr (Second) first.add_blocks_to(grad_key.acc, cot_query_rows, i, of_cot_query);
        }
      }
      hold_back_loads();
    }
  }
};

}  // namespace natten_ext::cuda
