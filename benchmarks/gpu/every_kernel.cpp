// Every CUDA kernel on odd little problems, without torch: what compute-sanitizer watches. All orders are compared with
// the formulas of docs/double_backward.md in float64.
//
//   every_kernel [MODE...]     of bfloat16, float16, tf32, float32 and float64; all without
//
// A line is a problem, and "right" or what is wrong; the exit status is the number of those that are wrong, up to 99. setup.py
// links it with the kernels for a GPU, tests/cuda/emulator.py with those for the host.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/calls.h"

using namespace natten_ext;
using cuda::Context;

namespace {

// ------------------------------------------------------------------------------------------ the device's memory

#if defined(NATTEN_EXT_EMULATOR)
using cuda::bits_of, cuda::from_bits;
void* new_memory(size_t bytes) { return std::aligned_alloc(16, (bytes + 15) / 16 * 16); }
void free_memory(void* data) { std::free(data); }
void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void fill(void* data, size_t bytes) { std::memset(data, 0xff, bytes); }
int shared_limit() { return 227 * 1024; }  // as an H100
#else
uint32_t bits_of(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, 4);
  return bits;
}
float from_bits(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}
void* new_memory(size_t bytes) {
  void* data = nullptr;
  cuda::check(cudaMalloc(&data, bytes), "memory");
  return data;
}
void free_memory(void* data) { cudaFree(data); }
void copy(void* to, const void* from, size_t bytes) { cuda::check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "a copy"); }
void fill(void* data, size_t bytes) { cuda::check(cudaMemset(data, 0xff, bytes), "memory"); }
int shared_limit() {
  int limit = 0;
  cuda::check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "shared memory of the GPU");
  return limit;
}
#endif

// ------------------------------------------------------------------------------------------ numbers

struct Mode {
  const char* name;
  DType dtype;
  bool tf32;
  double allowed;  // error of a result, as a part of its largest number
};
const Mode kModes[] = {{"bfloat16", DType::bfloat16, false, 4e-2}, {"float16", DType::float16, false, 5e-3},
                       {"tf32", DType::float32, true, 5e-3},     {"float32", DType::float32, false, 1e-5},
                       {"float64", DType::float64, false, 1e-13}};

// The bits of a number that half precision holds as it is.
uint16_t half_bits(float number) {
  const uint32_t bits = bits_of(number), sign = bits >> 16 & 0x8000;
  const uint32_t size = number == 0 ? 0 : ((bits & 0x7fffffff) >> 13) - (112 << 10);
  return static_cast<uint16_t>(sign | size);
}
double from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size = exponent == 31 ? NAN : exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

void to_bytes(void* at, double number, DType dtype) {
  const float single = static_cast<float>(number);
  const uint16_t two = dtype == DType::float16 ? half_bits(single) : static_cast<uint16_t>(bits_of(single) >> 16);
  if (dtype == DType::float64) std::memcpy(at, &number, 8);
  else if (dtype == DType::float32) std::memcpy(at, &single, 4);
  else std::memcpy(at, &two, 2);
}
double from_bytes(const void* at, DType dtype) {
  double number;
  float single;
  uint16_t two;
  if (dtype == DType::float64) return std::memcpy(&number, at, 8), number;
  if (dtype == DType::float32) return std::memcpy(&single, at, 4), single;
  std::memcpy(&two, at, 2);
  return dtype == DType::float16 ? from_half(two) : from_bits(uint32_t{two} << 16);
}

// A number and its derivative along a direction.
struct Dual {
  double value = 0, tangent = 0;
  Dual(double value = 0, double tangent = 0) : value(value), tangent(tangent) {}
  Dual operator+(const Dual& o) const { return {value + o.value, tangent + o.tangent}; }
  Dual operator-(const Dual& o) const { return {value - o.value, tangent - o.tangent}; }
  Dual operator*(const Dual& o) const { return {value * o.value, tangent * o.value + value * o.tangent}; }
  Dual operator/(const Dual& o) const { return {value / o.value, (tangent - value / o.value * o.tangent) / o.value}; }
  Dual& operator+=(const Dual& o) { return *this = *this + o; }
};
Dual exponential(const Dual& x) { return {std::exp(x.value), std::exp(x.value) * x.tangent}; }
Dual logarithm(const Dual& x) { return {std::log(x.value), x.tangent / x.value}; }

using Numbers = std::vector<Dual>;

// ------------------------------------------------------------------------------------------ tensors

enum class Shape { queries, keys, table, rows };  // of the first two maps (batch, z, y, x, head, channel); rows: (batch, head, query)

int64_t count_of(const Problem& p, Shape shape) {
  if (shape == Shape::rows) return p.rows();
  if (shape == Shape::table) return p.heads * p.table_size();
  const bool of_keys = shape == Shape::keys;
  return p.batch * p.depth * p.height * (of_keys ? p.key_width : p.width) * (of_keys ? p.key_heads : p.heads) * p.head_dim;
}

// An allocation of its own, so that an access beyond it is seen.
struct Tensor {
  View view;
  int64_t count = 0;

  Tensor(const Problem& p, Shape shape, DType dtype, const Numbers* values, double Dual::*part = &Dual::value)
      : count(count_of(p, shape)) {
    const size_t size = cuda::element_size(dtype);
    view.data = new_memory(count * size);
    view.dtype = dtype;
    if (shape == Shape::table) {
      view.x = 1, view.y = p.table_width(), view.z = view.y * p.table_height(), view.head = p.table_size();
    } else if (shape == Shape::rows) {
      view.x = 1, view.y = p.width, view.z = p.width * p.height, view.head = p.queries(), view.batch = view.head * p.heads;
    } else {
      view.of_keys = shape == Shape::keys;
      view.head = p.head_dim, view.x = (view.of_keys ? p.key_heads : p.heads) * p.head_dim;
      view.y = (view.of_keys ? p.key_width : p.width) * view.x;
      view.z = p.height * view.y, view.batch = p.depth * view.z;
    }
    if (values == nullptr) {
      fill(view.data, count * size);
      return;
    }
    std::vector<char> bytes(count * size);
    for (int64_t i = 0; i < count; ++i) to_bytes(&bytes[i * size], (*values)[i].*part, dtype);
    copy(view.data, bytes.data(), bytes.size());
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { free_memory(view.data); }

  std::vector<double> numbers() const {
    const size_t size = cuda::element_size(view.dtype);
    std::vector<char> bytes(count * size);
    copy(bytes.data(), view.data, bytes.size());
    std::vector<double> result(count);
    for (int64_t i = 0; i < count; ++i) result[i] = from_bytes(&bytes[i * size], view.dtype);
    return result;
  }
};

// ------------------------------------------------------------------------------------------ the formulas

// What a query sees of an axis: whether a key, and at which place of the table.
struct Sight {
  bool seen;
  int64_t place;
};
Sight sight(Kind kind, int64_t query, int64_t key, int64_t length, int64_t window, const AxisWindow& w, int64_t table_kernel) {
  if (kind == Kind::full) return {true, 0};
  if (kind == Kind::grid) return {query / window == key / window, key - query + window - 1};
  const ClassKeys<int64_t> keys = axis_keys(query, length, w);
  const bool seen = key >= keys.start && key < keys.end && (key - keys.start) % w.dilation == 0;
  return {seen, (key - query) / w.dilation + table_kernel - 1};
}

// All that a forward and a backward take and give.
struct Attention {
  const Problem& p;
  const bool has_table;
  Numbers query, key, value, table, grad_output, grad_lse;
  Numbers output, lse, grad_query, grad_key, grad_value, grad_table;

  Attention(const Problem& p, bool has_table, std::mt19937& random) : p(p), has_table(has_table) {
    const auto fill = [&](Numbers& numbers, Shape shape, bool moves) {
      std::uniform_int_distribution<int> thirtyseconds(-32, 32);
      numbers.resize(count_of(p, shape));
      for (Dual& n : numbers) n = {thirtyseconds(random) / 32.0, moves ? thirtyseconds(random) / 32.0 : 0.0};
    };
    fill(query, Shape::queries, true), fill(key, Shape::keys, true), fill(value, Shape::keys, true);
    if (has_table) fill(table, Shape::table, true);
    fill(grad_output, Shape::queries, false), fill(grad_lse, Shape::rows, false);
    output.resize(query.size()), lse.resize(p.rows()), grad_table.resize(table.size());
    grad_query.resize(query.size()), grad_key.resize(key.size()), grad_value.resize(value.size());
    for (int64_t row = 0; row < p.rows(); ++row) attend(row / p.queries() / p.heads, row / p.queries() % p.heads, row % p.queries(), row);
  }

  // One query of a head.
  void attend(int64_t batch, int64_t head, int64_t i, int64_t row) {
    const int64_t z = i / p.width / p.height, y = i / p.width % p.height, x = i % p.width, d = p.head_dim;
    const auto at = [&](int64_t tokens, int64_t token, int64_t heads) {
      return ((batch * tokens + token) * heads + head * heads / p.heads) * d;
    };
    struct Pair {
      int64_t key, place;
      Dual weight;
    };
    std::vector<Pair> pairs;
    const HeadWindow w = p.kind == Kind::neighborhood ? p.windows[head] : HeadWindow{};
    const int64_t keys = p.depth * p.height * p.key_width, q = at(p.queries(), i, p.heads);
    Dual sum;
    for (int64_t j = 0; j < keys; ++j) {
      const Sight of_z = sight(p.kind, z, j / p.key_width / p.height, p.depth, p.window_z, w.z, p.table_kernel_z());
      const Sight of_y = sight(p.kind, y, j / p.key_width % p.height, p.height, p.window_y, w.y, p.table_kernel_y());
      const Sight of_x = sight(p.kind, x, j % p.key_width, p.width, p.window_x, w.x, p.table_kernel_x());
      if (!of_z.seen || !of_y.seen || !of_x.seen) continue;
      Pair pair{at(keys, j, p.key_heads), ((head * p.table_depth() + of_z.place) * p.table_height() + of_y.place) * p.table_width() + of_x.place, {}};
      Dual score;
      for (int64_t c = 0; c < d; ++c) {
        const Dual a = query[q + c], b = key[pair.key + c];
        score += p.l2 ? (a - b) * (a - b) : a * b;
      }
      score = score * (p.l2 ? -p.scale : p.scale);
      if (has_table) score += table[pair.place];
      pair.weight = exponential(score);
      sum += pair.weight;
      pairs.push_back(pair);
    }
    lse[row] = logarithm(sum);
    Dual mean;  // of dP under the weights
    std::vector<Dual> products;
    for (Pair& pair : pairs) {
      pair.weight = pair.weight / sum;
      Dual product;
      for (int64_t c = 0; c < d; ++c) {
        output[q + c] += pair.weight * value[pair.key + c];
        grad_value[pair.key + c] += pair.weight * grad_output[q + c];
        product += grad_output[q + c] * value[pair.key + c];
      }
      products.push_back(product);
      mean += pair.weight * product;
    }
    for (size_t n = 0; n < pairs.size(); ++n) {
      const Dual slope = pairs[n].weight * (products[n] - mean + grad_lse[row]), factor = slope * p.dot_scale();
      if (has_table) grad_table[pairs[n].place] += slope;
      for (int64_t c = 0; c < d; ++c) {
        const Dual a = query[q + c], b = key[pairs[n].key + c];
        grad_query[q + c] += factor * (p.l2 ? b - a : b);
        grad_key[pairs[n].key + c] += factor * (p.l2 ? a - b : a);
      }
    }
  }
};

// ------------------------------------------------------------------------------------------ problems

// What is wrong with a result; empty if nothing is.
std::string compare(const char* name, const Tensor& result, const Numbers& expected, double Dual::*part, double allowed) {
  double largest = 0, error = 0;
  const std::vector<double> numbers = result.numbers();
  for (size_t i = 0; i < numbers.size(); ++i) {
    largest = std::max(largest, std::abs(expected[i].*part));
    const double difference = std::abs(numbers[i] - expected[i].*part);
    error = difference <= error ? error : difference;  // NaN too
  }
  if (error <= allowed * largest) return "";
  char text[120];
  std::snprintf(text, sizeof(text), "%s is off by %.2g of %.2g; ", name, error, largest);
  return text;
}

// All orders of a problem.
std::string check(const Problem& p, bool has_table, const Mode& mode, int limit) {
  std::mt19937 random(1);
  const Attention naive(p, has_table, random);
  const DType real = mode.dtype == DType::float64 ? DType::float64 : DType::float32;
  std::vector<std::unique_ptr<Tensor>> tensors;
  std::vector<std::function<std::string()>> comparisons;
  const auto operand = [&](View& view, Shape shape, const Numbers& numbers, double Dual::*part = &Dual::value) {
    const DType dtype = shape == Shape::rows ? real : mode.dtype;
    if (!numbers.empty()) view = tensors.emplace_back(std::make_unique<Tensor>(p, shape, dtype, &numbers, part))->view;
  };
  const auto result = [&](View& view, const char* name, Shape shape, const Numbers& expected, double Dual::*part = &Dual::value) {
    if (expected.empty()) return;
    const Tensor& t = *tensors.emplace_back(std::make_unique<Tensor>(p, shape, shape == Shape::rows ? real : mode.dtype, nullptr));
    view = t.view;
    comparisons.push_back([&t, &expected, name, part, &mode] { return compare(name, t, expected, part, mode.allowed); });
  };
  const auto run = [&](void (*launch)(const Arguments&, bool, Context&), const Arguments& a) {
    std::vector<void*> workspace;
    Context context{};
    context.shared_limit = limit;
    context.table_blocks = 3;  // few, so that each has several tiles
    context.new_memory = [&](size_t bytes) { return workspace.emplace_back(new_memory(bytes)); };
    launch(a, mode.tf32, context);
    std::string wrong;
    for (const auto& comparison : comparisons) wrong += comparison();  // copies wait for the launches
    comparisons.clear();
    for (void* data : workspace) free_memory(data);
    return wrong;
  };

  Arguments a{};
  a.problem = p;
  operand(a.query, Shape::queries, naive.query), operand(a.key, Shape::keys, naive.key);
  operand(a.value, Shape::keys, naive.value), operand(a.bias, Shape::table, naive.table);
  Problem two_parts = p;
  two_parts.batch *= 2;
  const Tensor lse(two_parts, Shape::rows, real, nullptr);
  a.lse = lse.view.data;
  result(a.output, "output", Shape::queries, naive.output);
  result(a.natural_lse, "lse", Shape::rows, naive.lse);
  std::string wrong = run(cuda::launch_forward, a);

  a.natural_lse = {};
  operand(a.grad_output, Shape::queries, naive.grad_output), operand(a.grad_lse, Shape::rows, naive.grad_lse);
  const auto gradients = [&](double Dual::*part) {
    result(a.grad_query, "grad_query", Shape::queries, naive.grad_query, part);
    result(a.grad_key, "grad_key", Shape::keys, naive.grad_key, part);
    result(a.grad_value, "grad_value", Shape::keys, naive.grad_value, part);
    result(a.grad_bias, "grad_bias", Shape::table, naive.grad_table, part);
  };
  gradients(&Dual::value);
  wrong += run(cuda::launch_backward, a);

  operand(a.cot_query, Shape::queries, naive.query, &Dual::tangent), operand(a.cot_key, Shape::keys, naive.key, &Dual::tangent);
  operand(a.cot_value, Shape::keys, naive.value, &Dual::tangent), operand(a.cot_bias, Shape::table, naive.table, &Dual::tangent);
  gradients(&Dual::tangent);
  result(a.grad_grad_output, "grad_grad_output", Shape::queries, naive.output, &Dual::tangent);
  result(a.grad_grad_lse, "grad_grad_lse", Shape::rows, naive.lse, &Dual::tangent);
  return wrong + run(cuda::launch_double_backward, a);
}

struct Case {
  const char* name;
  Problem problem;
  bool table;
};

Problem map(Kind kind, int64_t batch, int64_t depth, int64_t height, int64_t width, std::vector<HeadWindow> windows, bool l2 = false) {
  Problem p{};
  p.kind = kind;
  p.batch = batch, p.depth = depth, p.height = height, p.width = p.key_width = width;
  p.heads = p.key_heads = std::max<int64_t>(1, static_cast<int64_t>(windows.size()));
  p.windows = std::move(windows);
  p.l2 = l2;
  return p;
}

// Several tiles with borders, residue classes of unequal length, heads that differ.
std::vector<Case> ordinary_cases() {
  Case cross{"full", map(Kind::full, 2, 1, 1, 21, {}, true), false};
  cross.problem.key_width = 75;
  Case grid{"grid", map(Kind::grid, 1, 1, 9, 10, {}), true};
  grid.problem.window_y = 3, grid.problem.window_x = 5;
  return {{"neighborhood", map(Kind::neighborhood, 1, 1, 9, 11, {{{}, {3}, {5}}, {{}, {3, 3}, {5, 2}}}), true},
          cross,
          {"neighborhood, l2", map(Kind::neighborhood, 2, 1, 10, 9, {{{}, {2, 2}, {4}}}, true), true},
          grid};
}
std::vector<Case> general_cases() {
  const HeadWindow one{{}, {3}, {5, 2}}, other{{}, {4}, {3}};
  Case shared{"shared keys", map(Kind::neighborhood, 1, 1, 9, 11, {one, one, other, other}), true};
  shared.problem.key_heads = 2;
  return {shared,
          {"line", map(Kind::neighborhood, 1, 1, 1, 75, {{{}, {}, {9, 1, 4}}, {{}, {}, {30}}}), true},
          {"volume", map(Kind::neighborhood, 1, 3, 5, 9, {{{2, 1, 1, true}, {4, 1, 3}, {5}}}, true), true},
          {"causal", map(Kind::neighborhood, 2, 1, 7, 11, {{{}, {3, 2, 1, true}, {4, 2, 2, true}}}), true}};
}
// For the kernels of windows of 7 x 7 keys: classes of at most 8 x 8, and larger ones. Those of the double backward take no cotangent
// of a table's gradient.
std::vector<Case> narrow_cases() {
  return {{"7 x 7", map(Kind::neighborhood, 1, 1, 19, 18, {{{}, {7}, {7}}, {{}, {7, 2}, {7}}}), true},
          {"7 x 7 without a table", map(Kind::neighborhood, 1, 1, 19, 18, {{{}, {7}, {7}}, {{}, {7, 2}, {7}}}), false},
          {"7 x 7, whole", map(Kind::neighborhood, 1, 1, 15, 8, {{{}, {7, 2}, {7}}}), true},
          {"7 x 7, whole, without a table", map(Kind::neighborhood, 1, 1, 15, 8, {{{}, {7, 2}, {7}}}), false}};
}

// And for those of windows of 16 x 16 positions, likewise.
std::vector<Case> grid_cases() {
  std::vector<Case> cases;
  for (const bool table : {true, false}) {
    Case c{table ? "grid of 16 x 16" : "grid of 16 x 16 without a table", map(Kind::grid, 1, 1, 16, 32, {}), table};
    c.problem.window_y = c.problem.window_x = 16;
    cases.push_back(c);
  }
  return cases;
}

// And for short sequences.
std::vector<Case> short_cases() {
  return {{"short sequence", map(Kind::full, 2, 1, 1, 65, {}), false}, {"short sequence, l2", map(Kind::full, 2, 1, 1, 65, {}, true), false}};
}

// One number of channels for each that kernels pad to (HeadDims, NarrowDims, GridDims, GridDoubleBackwardDims and ShortDims), most of them less than that.
const int kChannels[] = {5, 16, 24, 64, 90, 128, 250};
const int kNarrowChannels[] = {8, 16, 24};
const int kGridChannels[] = {4, 16, 24, 64, 72, 96};
const int kShortChannels[] = {24, 64, 72};

int check_mode(const Mode& mode) {
  int wrong = 0;
  const auto run = [&](Case c, int channels, int limit) {
    Problem& p = c.problem;
    p.head_dim = channels;
    p.scale = p.l2 ? 0.5 / channels : 1 / std::sqrt(channels);
    std::string what;
    try {
      what = check(p, c.table, mode, limit);
    } catch (const std::exception& error) {
      what = error.what();
    }
    std::printf("%s, %d channels, %d bytes shared, %s: %s\n", c.name, channels, limit, mode.name, what.empty() ? "right" : what.c_str());
    std::fflush(stdout);
    wrong += !what.empty();
  };
  const int most = shared_limit();
  int index = 0;
  for (const std::vector<Case>& cases : {ordinary_cases(), general_cases()}) {
    for (const int channels : kChannels) {
      // With little shared memory: pieces in two stages or one, and tables in global memory.
      const int little = static_cast<int>(cuda::least_shared_memory(mode.dtype, channels)) + 2048;
      const Case& c = cases[index % cases.size()];
      if (little > most) std::printf("%s, %d channels, %s: not on this GPU\n", c.name, channels, mode.name);
      else run(c, channels, index % 3 == 1 ? little : most);
      ++index;
    }
  }
  if (cuda::element_size(mode.dtype) == 2) {
    for (const Case& c : narrow_cases()) {
      for (const int channels : kNarrowChannels) run(c, channels, most);
    }
    for (const Case& c : grid_cases()) {
      for (const int channels : kGridChannels) run(c, channels, most);
    }
    for (const int channels : kShortChannels) run(short_cases()[channels / 8 % 2], channels, most);
  }
  return wrong;
}

}  // namespace

int main(int count, char** arguments) try {
  const std::vector<std::string> names(arguments + 1, arguments + count);
  for (const std::string& name : names) {
    const bool known = std::any_of(std::begin(kModes), std::end(kModes), [&](const Mode& m) { return m.name == name; });
    require(known, "modes are bfloat16, float16, tf32, float32 and float64, got " + name);
  }
  int wrong = 0;
  for (const Mode& mode : kModes) {
    if (names.empty() || std::count(names.begin(), names.end(), mode.name) > 0) wrong += check_mode(mode);
  }
  return std::min(wrong, 99);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 100;
}
