// Backward of windows of 7 x 7 keys, the key-centred side (narrow.h): gradients of keys and values. Seen from a key, the queries
// around it are as keys are around a query, with offsets the other way round. But near borders, where windows are shifted
// inward, up to 10 x 10 queries see a key, and of whole classes up to 8 x 8.
#include "narrow_launch.h"

namespace natten_ext::cuda {

// Which queries see the keys of a group, wherever it is: units of two blocks of eight, on a row of the map or of whole
// classes on two.
template <class M, int Dim, bool Whole>
struct KeyFrame {
  using Tile = NarrowTile<Dim, Whole>;
  using Group = NarrowGroup<Dim, Whole, true>;
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
    const int y = narrow_thread() / Tile::kTableRow, x = narrow_thread() % Tile::kTableRow, down = y - kNarrowKernel + 1;
    if (y > Tile::kTableExtent) return;
    const float value = narrow_table_entry<Element, Tile>(p, head, Tile::kTableExtent - 1 - y, Tile::kTableExtent - 1 - x);
    NATTEN_EXT_UNROLL
    for (int copy = 0; copy < kCopies; ++copy) {
      const bool seen = (copy < 2 || down >= -Tile::kReach) && (copy % 2 != 0 || down <= Tile::kReach);
      store_shared(Tile::kTable + copy * Tile::kTableBytes + narrow_thread() * static_cast<Shared>(sizeof(float)),
                   seen ? value : -kInfinity<float>);
    }
  }
};

template <class M, int Dim, bool Whole>
struct NarrowBackwardKey {
  using Element = typename M::Element;
  using Tile = NarrowTile<Dim, Whole>;
  using Group = NarrowGroup<Dim, Whole, true>;
  using Columns = FrameColumns<Dim, Whole>;
  using Frame = KeyFrame<M, Dim, Whole>;
  using Rows = FrameScores<Dim, Whole>;
  using Sums = FrameSums<M, Dim, Whole, false>;
  using Numbers = NumberChunk<float>;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kBlocksAtATime = Dim == 32 ? 1 : 2;
#else
  static constexpr int kBlocksAtATime = 2;
#endif
  // Groups whose own rows are staged with the tile. Where rows are short, shared memory has room for all.
  static constexpr int kAhead = Dim == 8 ? Tile::kGroups : 1;
  // Behind the tables: numbers of the staged queries, and a warp's own keys and values, of one group or of all.
  static constexpr Shared kNumbers = Tile::kTable + Frame::kCopies * Tile::kTableBytes, kOwn = kNumbers + Tile::kSlots * sizeof(Numbers);
  static_assert((kOwn - Tile::kOwn) % Tile::kBytes == 0);
  static constexpr uint32_t kShared = kOwn + kNarrowWarps * kAhead * 2 * kWarpRows * Tile::kBytes;
  static constexpr bool kTableGradient = false;

  NarrowLeft<M, Dim> key, value;
  Sums grad_key, grad_value;

  NATTEN_EXT_DEVICE static uint32_t own_slot(int group, int tensor) {
    const uint32_t of_warp = narrow_thread() / kWarp * kAhead + (kAhead > 1 ? group : 0);
    return (kOwn - Tile::kOwn) / Tile::kBytes + (of_warp * 2 + tensor) * kWarpRows;
  }

  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) {
    const int head = p.head[narrow_launch_head(p)];
    const Tile tile(p, head, narrow_block_of_head(p));
    if (!tile.exists) return;
    stage_narrow_halo<Tile::kChunks>(p, tile, {&p.query, &p.grad_output}, {Tile::kKeys, Tile::kValues}, p.head_bytes);
    stage_narrow_halo<1>(p, tile, {&p.row_numbers}, {kNumbers}, sizeof(Numbers));
    Frame::fill_tables(p, head);
    const float factor = p.scale * kLog2E<float>;
    NATTEN_EXT_NO_UNROLL
    for (int i = 0; i < Tile::kGroups; ++i) {
      const Group group(p, tile, i);
      if (i == 0 || kAhead == 1) {
        stage_own(p, tile, group, i);
        NATTEN_EXT_UNROLL
        for (int next = 1; next < kAhead; ++next) stage_own(p, tile, Group(p, tile, next), next);
        copy_async_commit();
        copy_async_wait<0>();
        if (i == 0) sync_block();
        else sync_warp();
      }
      if (group.empty()) continue;
      NarrowBackwardKey gradients;
      gradients.key.template load<Tile>(own_slot(i, 0));
      gradients.value.template load<Tile>(own_slot(i, 1));
      if (Frame::is_plain(tile, group)) gradients.attend(factor, group, Columns(group));
      else gradients.template attend_units<false>(factor, Frame(tile, group));
      const auto finish = [&](const Tile& tile, const Group& group) {
        // Zero times NaN is NaN: as in `with_care`.
        if (any_in_warp(!all_finite(gradients.grad_key.acc) || !all_finite(gradients.grad_value.acc))) {
          gradients.template attend_units<true>(factor, Frame(tile, group));
        }
        gradients.write(p, tile, group, i);
      };
      if constexpr (Dim == 32) {  // where computing them again saves registers
        const Tile again(p, head, forget(narrow_block_of_head(p)));
        finish(again, Group(p, again, forget(i)));
      } else {
        finish(tile, group);
      }
    }
  }

  // Starts the copies of a group's own rows.
  NATTEN_EXT_DEVICE static void stage_own(const NarrowParams& p, Tile tile, const Group& group, int i) {
    if (group.empty()) return;
    if (Dim == 32) tile.head = forget(tile.head), tile.batch = forget(tile.batch);  // so that no addresses are kept
    group.stage(p, tile, p.key, own_slot(i, 0), false);
    group.stage(p, tile, p.value, own_slot(i, 1), false);
  }

  NATTEN_EXT_DEVICE void write(const NarrowParams& p, const Tile& tile, const Group& group, int i) const {
    if (p.grad_key.data != nullptr) group.template write<Element>(grad_key.acc, {p.scale, p.scale}, p, tile, p.grad_key, own_slot(i, 0));
    if (p.grad_value.data != nullptr) group.template write<Element>(grad_value.acc, {1, 1}, p, tile, p.grad_value, own_slot(i, 1));
  }

  NATTEN_EXT_DEVICE static Shared numbers_at(uint32_t slot) { return kNumbers + slot * static_cast<Shared>(sizeof(Numbers)); }

  // The walk of the query-centred side, which has no spills with code of its own only.
  NATTEN_EXT_DEVICE void attend(float factor, const Group& group, const Columns& columns) {
    float lower[2] = {-kInfinity<float>, -kInfinity<float>};  // entries for the lower keys
    if (!group.lower) columns.load_entries(lower, 0);
    Rows queries(Tile::kKeys, group.frame), grad_outputs(Tile::kValues, group.frame);
    FrameResults<Dim, Whole> query_rows(Tile::kKeys, group.frame), grad_output_rows(Tile::kValues, group.frame);
    Shared numbers[2];
    NATTEN_EXT_UNROLL
    for (int c = 0; c < 2; ++c) numbers[c] = numbers_at(group.frame + columns.frame_column(static_cast<int>(narrow_lane() % 4 * 2) + c));
    grad_key.clear_all();
    grad_value.clear_all();
    NATTEN_EXT_UNROLL
    for (int r = 0; r < Group::kFrameRows; ++r) {
      if (r == kNarrowKernel && !group.lower) continue;
      if (r % Rows::kRowsAtATime == 0) {
        queries.load(r);
        grad_outputs.load(r);
      }
      float s[4], dp[4], weights[4] = {0, 0, 0, 0}, ds[4] = {0, 0, 0, 0}, upper[2] = {0, 0};
      if (r < kNarrowKernel) columns.load_entries(upper, r + 1);
      frame_products(s, key, queries, r % Rows::kRowsAtATime, columns);
      frame_products(dp, value, grad_outputs, r % Rows::kRowsAtATime, columns);
      NATTEN_EXT_UNROLL
      for (int c = 0; c < 2; ++c) {
        const Numbers of_query = load_shared<Numbers>(numbers[c] + r * Tile::kColumns * static_cast<Shared>(sizeof(Numbers)));
        NATTEN_EXT_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int e = 2 * h + c;
          if (!Group::may_have(r, h)) continue;
          const float score = fused_multiply_add(s[e], factor, h ? lower[c] : upper[c]);
          weights[e] = weight_of(score, of_query.numbers[kBase], of_query.numbers[kLogSum]);
          ds[e] = weights[e] * (dp[e] - of_query.numbers[kD]);
        }
      }
      grad_value.add(grad_output_rows, r, weights, columns);
      grad_key.add(query_rows, r, ds, columns);
      lower[0] = upper[0], lower[1] = upper[1];
      hold_back_loads();
    }
  }

  // The same for any frame. `Careful`: in ordinary arithmetic, which leaves out queries that do not see a key.
  template <bool Careful>
  NATTEN_EXT_DEVICE void attend_units(float factor, const Frame& frame) {
    constexpr int kUnroll = Whole && !Careful ? Frame::kWholeUnits : 1;
    FrameScores<Dim, Whole, 2> queries(Tile::kKeys, frame.slot), grad_outputs(Tile::kValues, frame.slot);
    FrameResults<Dim, Whole> query_rows(Tile::kKeys, frame.slot), grad_output_rows(Tile::kValues, frame.slot);
    constexpr int kAtATime = decltype(queries)::kRowsAtATime;
    static_assert(kAtATime == decltype(query_rows)::kProductsAtATime);
    const Shared numbers = numbers_at(frame.slot + narrow_lane() % 4 * 2);
    grad_key.clear_all();
    grad_value.clear_all();
    NATTEN_EXT_UNROLL_BY(kUnroll)
    for (int first = 0; first < frame.units; first += kAtATime) {
      queries.load(first);
      grad_outputs.load(first);
      NATTEN_EXT_UNROLL
      for (int i = 0; i < kAtATime; ++i) {
        const int unit = first + i;
        if (!Whole && unit >= frame.units) break;
        float weights[2][4], ds[2][4];
        clear(weights);
        clear(ds);
        NATTEN_EXT_UNROLL
        for (int b = 0; b < 2; ++b) {
          key.multiply_rows(weights[b], [&](int chunk) { return queries.word(i, b, chunk); });
          value.multiply_rows(ds[b], [&](int chunk) { return grad_outputs.word(i, b, chunk); });
          NATTEN_EXT_UNROLL
          for (int c = 0; c < 2; ++c) {
            const uint32_t position = unit * Frame::kUnitSlots + 8 * b + c;
            const Numbers of_query = load_shared<Numbers>(numbers + position * static_cast<Shared>(sizeof(Numbers)));
            NATTEN_EXT_UNROLL
            for (int h = 0; h < 2; ++h) {
              const bool exists = !Careful || (frame.valid_column(b, c) && frame.has(unit, b, h));
              float &weight = weights[b][2 * h + c], &difference = ds[b][2 * h + c];
              const float score = fused_multiply_add(weight, factor, load_shared<float>(frame.entry(unit, b, h, c)));
              weight = weight_of(score, of_query.numbers[kBase], of_query.numbers[kLogSum]);
              difference = product_of(weight, difference - of_query.numbers[kD]);
              if (!exists) weight = difference = kMasked<float>;
            }
          }
          if constexpr (Careful) {
            const auto slot_of = [&](int column) { return frame.slot + unit * Frame::kUnitSlots + 8 * b + column; };
            grad_value.add_valid(Tile::kValues, weights[b], slot_of);
            grad_key.add_valid(Tile::kKeys, ds[b], slot_of);
          }
        }
        if constexpr (!Careful) {
          if (i == 0) {
            query_rows.load(first);
            grad_output_rows.load(first);
          }
          grad_value.add_blocks(grad_output_rows, i, weights);
          grad_key.add_blocks(query_rows, i, ds);
        }
      }
      hold_back_loads();
    }
  }
};

template <class M>
std::vector<HeadRange> narrow_backward_key(const Params& p, const std::vector<Window>& windows, Context& context) {
  return launch_narrow<M, NarrowBackwardKey>(p, windows, context, NarrowDims<M>{});
}

template std::vector<HeadRange> narrow_backward_key<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);

}  // namespace natten_ext::cuda
