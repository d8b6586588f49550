// bindings.cpp - the only file that knows Python: checks arguments, allocates results from the
// pool, releases the interpreter's lock, and calls the table of the instruction set in use.
//
// Names, arguments and results are those of tinylm/kernels/reference.py. Wrong shapes and values
// are ValueErrors, wrong dtypes TypeErrors; nothing is cast silently. An input that is not
// C-contiguous is copied, except where a kernel takes strides (attention and rope, last dimension
// contiguous).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>
#include "kernels.h"
#include "runtime.h"

namespace py = pybind11;
using namespace py::literals;
using Floats = py::array_t<float, py::array::c_style>;
using Strided = py::array_t<float>;
using Ints = py::array_t<int32_t, py::array::c_style>;
using Optional = std::optional<py::array>;
using Shape = std::vector<py::ssize_t>;

// ---- results -----------------------------------------------------------------------------------

static long size_of(const Shape& shape) {
    long n = 1;
    for (auto s : shape) n *= s;
    return n;
}

static Floats empty(const Shape& shape) {
    for (auto s : shape)
        if (s < 0) throw py::value_error("[empty] shape: expected no negative dimension");
    const size_t bytes = size_of(shape) * sizeof(float);
    void* p = pool.take(bytes);
    PyObject* owner = PyCapsule_New(p, nullptr, [](PyObject* capsule) {
        pool.give(PyCapsule_GetPointer(capsule, nullptr), (size_t)PyCapsule_GetContext(capsule));
    });
    PyCapsule_SetContext(owner, (void*)bytes);
    return Floats(shape, static_cast<float*>(p), py::reinterpret_steal<py::object>(owner));
}

// (B, H, T, D): H heads of an array (B, T, width), of which `first` is the first one.
static Strided heads_of(Floats rows, long first, long H, long D) {
    const long B = rows.shape(0), T = rows.shape(1), width = rows.shape(2);
    const py::ssize_t f = sizeof(float);
    return Strided({B, H, T, D}, {T * width * f, D * f, width * f, f},
                   rows.mutable_data() + first * D, rows);
}
static Strided empty_heads(long B, long H, long T, long D) {  // merging them afterwards is free
    return heads_of(empty({B, T, H * D}), 0, H, D);
}

// ---- shapes ------------------------------------------------------------------------------------

constexpr long ANY = -1;

static Shape shape_of(const py::array& x) { return Shape(x.shape(), x.shape() + x.ndim()); }
static Shape leading(const py::array& x) { return Shape(x.shape(), x.shape() + x.ndim() - 1); }
static Shape with_last(Shape shape, long last) {
    shape.push_back(last);
    return shape;
}
static long last_of(const py::array& x) { return x.shape(x.ndim() - 1); }
static long rows_of(const py::array& x) { return size_of(leading(x)); }

static std::string text_of(const Shape& shape) {
    std::string text;
    for (auto s : shape)
        text += (text.empty() ? "" : ", ") + (s == ANY ? "any" : std::to_string(s));
    return "(" + text + (shape.size() == 1 ? ",)" : ")");
}
static bool matches(const py::array& x, const Shape& shape) {
    if (x.ndim() != (long)shape.size()) return false;
    for (size_t i = 0; i < shape.size(); ++i)
        if (shape[i] != ANY && shape[i] != x.shape(i)) return false;
    return true;
}

// ---- arguments ---------------------------------------------------------------------------------

// What a kernel is given for an argument.
template <class T>
static const T& raw(const T& x) {
    return x;
}
static float* raw(const Floats& x) { return const_cast<float*>(x.data()); }
static int32_t* raw(const Ints& x) { return const_cast<int32_t*>(x.data()); }
static Heads raw(const Strided& x) {
    const long f = sizeof(float);
    return {const_cast<float*>(x.data()), x.strides(0) / f, x.strides(1) / f, x.strides(2) / f};
}

// Checks the arguments of the kernel `name`, and words the errors.
class Op {
    const std::string name;

    [[noreturn]] void wrong_dtype(const char* arg, const char* expected, const py::array& x) const {
        throw py::type_error(what(arg) + expected + ", got " + std::string(py::str(x.dtype())));
    }
    std::string what(const char* arg) const { return "[" + name + "] " + arg + ": expected "; }

public:
    explicit Op(const char* name) : name(name) {}

    [[noreturn]] void wrong(const char* arg, const std::string& rest) const {
        throw py::value_error(what(arg) + rest);
    }
    void check(const char* arg, const py::array& x, const char* letters, const Shape& shape) const {
        if (matches(x, shape)) return;
        wrong(arg, std::string(letters) + " = " + text_of(shape) + ", got " + text_of(shape_of(x)));
    }
    void check_dtype(const char* arg, const py::array& x) const {
        if (!py::isinstance<py::array_t<float>>(x)) wrong_dtype(arg, "float32", x);
    }

    // float32 of this shape, contiguous
    Floats floats(const char* arg, const py::array& x, const char* letters,
                  const Shape& shape) const {
        check_dtype(arg, x);
        check(arg, x, letters, shape);
        return Floats(x);
    }
    // float32 of any shape (..., C), contiguous
    Floats floats(const char* arg, const py::array& x) const {
        check_dtype(arg, x);
        if (x.ndim() < 1) wrong(arg, "at least one dimension, got a scalar");
        return Floats(x);
    }
    // float32 (B, heads, tokens, D): only D contiguous
    Strided strided(const char* arg, const py::array& x, const char* letters,
                    const Shape& shape) const {
        check_dtype(arg, x);
        check(arg, x, letters, shape);
        bool whole = x.shape(3) <= 1 || x.strides(3) == sizeof(float);
        for (int i = 0; i < 3; ++i) whole &= x.strides(i) % (long)sizeof(float) == 0;
        return whole ? Strided(x) : Strided(Floats(x));
    }
    // float32, contiguous and writable: the array itself, never a copy
    Floats in_place(const char* arg, const py::array& x, const Shape& shape) const {
        check_dtype(arg, x);
        check(arg, x, "an array to write to", shape);
        if (!(x.flags() & py::array::c_style)) wrong(arg, "a C-contiguous array");
        if (!x.writeable()) wrong(arg, "a writable array");
        return Floats(x);
    }
    // the array to write to that was given, or a new one
    Floats place(const char* arg, const Optional& x, const Shape& shape) const {
        return x ? in_place(arg, *x, shape) : empty(shape);
    }
    // int32 or int64 of this shape with least <= value < limit
    Ints ints(const char* arg, const py::array& x, const char* letters, const Shape& shape,
              long least, long limit) const {
        check(arg, x, letters, shape);
        if (py::isinstance<py::array_t<int32_t>>(x)) {
            const Ints y(x);
            return checked(arg, y, least, limit, y);
        }
        if (!py::isinstance<py::array_t<int64_t>>(x)) wrong_dtype(arg, "int32 or int64", x);
        return checked(arg, py::array_t<int64_t, py::array::c_style>(x), least, limit,
                       Ints(shape_of(x)));
    }

private:
    template <class From>
    Ints checked(const char* arg, const From& from, long least, long limit, Ints to) const {
        const auto* x = from.data();
        int32_t* y = const_cast<int32_t*>(to.data());
        const long n = from.size();
        for (long i = 0; i < n; ++i)
            if (x[i] < least || x[i] >= limit)
                wrong(arg, "values in [" + std::to_string(least) + ", " + std::to_string(limit) +
                               "), got " + std::to_string(x[i]));
        if ((const void*)x != (const void*)y)
            for (long i = 0; i < n; ++i) y[i] = x[i];
        return to;
    }
};

// Calls a kernel without the interpreter's lock.
template <class Kernel, class... Args>
static auto call(Kernel kernel, const Args&... args) {
    py::gil_scoped_release unlocked;
    return kernel(raw(args)...);
}
// The same with a last argument: as many threads as so many operations are worth.
template <class Kernel, class... Args>
static auto run(double work, Kernel kernel, const Args&... args) {
    return call(kernel, args..., threads_for(work));
}

// ---- products ----------------------------------------------------------------------------------

static void multiply(const Product& p) { run(2.0 / 6 * p.M * p.N * p.K, kernels().matmul, p); }

static Floats matmul(const py::array& a_, const py::array& b_, bool transpose_a, bool transpose_b) {
    const Op op("matmul");
    const Floats a = op.floats("a", a_, transpose_a ? "(K, M)" : "(M, K)", {ANY, ANY});
    const long M = a.shape(transpose_a), K = a.shape(!transpose_a);
    const Floats b = op.floats("b", b_, transpose_b ? "(N, K)" : "(K, N)",
                               transpose_b ? Shape{ANY, K} : Shape{K, ANY});
    const long N = b.shape(!transpose_b);
    Floats c = empty({M, N});
    multiply(
        {transpose_a, transpose_b, M, N, K, raw(a), last_of(a), raw(b), last_of(b), raw(c), N});
    return c;
}

static Floats check_weight(const Op& op, const py::array& weight, bool transposed, long C, long F) {
    return transposed ? op.floats("weight", weight, "(C, F)", {C, F})
                      : op.floats("weight", weight, "(F, C)", {F, C});
}

// Weights as products lay them, each packed at its first use, if that pays for products of so many
// rows. While one of these is entered (a `with` in Python, of this thread), linear_forward
// multiplies by what it holds: so nothing may change the weights as long as it is used.
class PackedWeights {
    struct Kept {
        py::array weight;  // so that nobody else gets its memory
        Floats packed;
    };
    using Key = std::tuple<const float*, long, long, bool, long>;
    std::map<Key, Kept> kept;
    const Kernels* const isa = &kernels();
    const bool bfloat16 = bfloat16_products, pays;
    static inline thread_local std::vector<PackedWeights*> entered;

    const float* find(const Product& p, const py::array& weight) {
        const bool same_kind = isa == &kernels() && bfloat16 == bfloat16_products;
        if (!pays || !same_kind || weight.data() != p.B || p.N == 0 || p.K == 0) return nullptr;
        const long size = isa->packed_size(p);  // larger where float32 is split, for many rows
        Kept& found = kept[{p.B, p.N, p.K, p.transpose_b, size}];
        if (found.packed.size() == 0) {
            const Floats packed = empty({size});
            run(1.0 * p.N * p.K, isa->pack, p, packed);
            if (found.packed.size() == 0) found = {weight, packed};  // or another thread was first
        }
        return raw(found.packed);
    }

public:
    explicit PackedWeights(long rows) : pays(bfloat16_products || rows > FEW_ROWS) {}
    void enter() { entered.push_back(this); }
    void leave(const py::args&) {
        if (!entered.empty()) entered.pop_back();
    }

    // The product by the packed weight, where one is held or worth it.
    static Product use(Product p, const py::array& weight) {
        if (!entered.empty()) p.packed = entered.back()->find(p, weight);
        return p;
    }
};

static Floats linear_forward(const py::array& x_, const py::array& weight_, const Optional& bias_,
                             bool transposed) {
    const Op op("linear_forward");
    const Floats x = op.floats("x", x_);
    const long N = rows_of(x), C = last_of(x);
    const Floats weight = check_weight(op, weight_, transposed, C, ANY);
    const long F = weight.shape(transposed);
    Floats bias, y = empty(with_last(leading(x), F));
    if (bias_) bias = op.floats("bias", *bias_, "(F)", {F});
    multiply(PackedWeights::use({false, !transposed, N, F, C, raw(x), C, raw(weight),
                                 weight.shape(1), raw(y), F, bias_ ? raw(bias) : nullptr},
                                weight_));
    return y;
}

static py::tuple linear_backward(const py::array& dy_, const py::array& x_,
                                 const py::array& weight_, bool transposed, bool has_bias,
                                 const Optional& dx_) {
    const Op op("linear_backward");
    const Floats x = op.floats("x", x_),
                 dy = op.floats("dy", dy_, "(..., F)", with_last(leading(x), ANY));
    const long N = rows_of(x), C = last_of(x), F = last_of(dy);
    const Floats weight = check_weight(op, weight_, transposed, C, F);
    Floats dx = op.place("dx", dx_, shape_of(x)), dweight = empty(shape_of(weight));
    if (dx_ && dx.data() == dy.data()) op.wrong("dx", "another array than dy");
    if (transposed)
        multiply({true, false, C, F, N, raw(x), C, raw(dy), F, raw(dweight), F});
    else
        multiply({true, false, F, C, N, raw(dy), F, raw(x), C, raw(dweight), C});
    multiply({false, transposed, N, C, F, raw(dy), F, raw(weight), weight.shape(1), raw(dx), C});
    if (!has_bias) return py::make_tuple(dx, dweight, py::none());
    Floats dbias = empty({F});
    run(N * F, kernels().sum_rows, dy, dbias, N, F);
    return py::make_tuple(dx, dweight, dbias);
}

// ---- embedding ---------------------------------------------------------------------------------

static Floats embedding_forward(const py::array& tokens_, const py::array& weight_) {
    const Op op("embedding_forward");
    const Floats weight = op.floats("weight", weight_, "(V, C)", {ANY, ANY});
    const Ints tokens = op.ints("tokens", tokens_, "(B, T)", shape_of(tokens_), 0, weight.shape(0));
    const long N = tokens.size(), C = weight.shape(1);
    Floats y = empty(with_last(shape_of(tokens), C));
    run(N * C, kernels().embedding_forward, tokens, weight, y, N, C);
    return y;
}

static Floats embedding_backward(const py::array& dy_, const py::array& tokens_, long V,
                                 const Optional& total) {
    const Op op("embedding_backward");
    if (V < 0) op.wrong("vocab_size", "no negative number, got " + std::to_string(V));
    const Ints tokens = op.ints("tokens", tokens_, "(B, T)", shape_of(tokens_), 0, V);
    const Floats dy = op.floats("dy", dy_, "(B, T, C)", with_last(shape_of(tokens), ANY));
    const long N = tokens.size(), C = last_of(dy);
    const Floats dweight = op.place("total", total, {V, C});
    run((N + V) * C, kernels().embedding_backward, dy, tokens, dweight, total.has_value(), N, V, C);
    return dweight;
}

// ---- normalisation -----------------------------------------------------------------------------

static py::tuple rms_norm_forward(const py::array& x_, const py::array& weight_, float eps) {
    const Op op("rms_norm_forward");
    const Floats x = op.floats("x", x_), weight = op.floats("weight", weight_, "(C)", {last_of(x)});
    Floats y = empty(shape_of(x)), rstd = empty(leading(x));
    run(x.size(), kernels().rms_norm_forward, x, weight, eps, y, rstd, rows_of(x), last_of(x));
    return py::make_tuple(y, rstd);
}

static py::tuple rms_norm_backward(const py::array& dy_, const py::array& x_,
                                   const py::array& weight_, const py::array& rstd_) {
    const Op op("rms_norm_backward");
    const Floats x = op.floats("x", x_), weight = op.floats("weight", weight_, "(C)", {last_of(x)});
    const Floats dy = op.floats("dy", dy_, "the shape of x", shape_of(x));
    const Floats rstd = op.floats("rstd", rstd_, "(...)", leading(x));
    Floats dx = empty(shape_of(x)), dweight = empty({last_of(x)});
    run(x.size(), kernels().rms_norm_backward, dy, x, weight, rstd, dx, dweight, rows_of(x),
        last_of(x));
    return py::make_tuple(dx, dweight);
}

static py::tuple layer_norm_forward(const py::array& x_, const py::array& weight_,
                                    const py::array& bias_, float eps) {
    const Op op("layer_norm_forward");
    const Floats x = op.floats("x", x_), weight = op.floats("weight", weight_, "(C)", {last_of(x)});
    const Floats bias = op.floats("bias", bias_, "(C)", {last_of(x)});
    Floats y = empty(shape_of(x)), mean = empty(leading(x)), rstd = empty(leading(x));
    run(x.size(), kernels().layer_norm_forward, x, weight, bias, eps, y, mean, rstd, rows_of(x),
        last_of(x));
    return py::make_tuple(y, mean, rstd);
}

static py::tuple layer_norm_backward(const py::array& dy_, const py::array& x_,
                                     const py::array& weight_, const py::array& mean_,
                                     const py::array& rstd_) {
    const Op op("layer_norm_backward");
    const Floats x = op.floats("x", x_), weight = op.floats("weight", weight_, "(C)", {last_of(x)});
    const Floats dy = op.floats("dy", dy_, "the shape of x", shape_of(x));
    const Floats mean = op.floats("mean", mean_, "(...)", leading(x));
    const Floats rstd = op.floats("rstd", rstd_, "(...)", leading(x));
    Floats dx = empty(shape_of(x)), dweight = empty({last_of(x)}), dbias = empty({last_of(x)});
    run(x.size(), kernels().layer_norm_backward, dy, x, weight, mean, rstd, dx, dweight, dbias,
        rows_of(x), last_of(x));
    return py::make_tuple(dx, dweight, dbias);
}

// ---- attention ---------------------------------------------------------------------------------

static Strided turn(const Op& op, const char* arg, const py::array& x_, const py::array& cos_,
                    const py::array& sin_, const py::array& positions_, float direction) {
    const Strided x = op.strided(arg, x_, "(B, H, T, D)", {ANY, ANY, ANY, ANY});
    const long B = x.shape(0), H = x.shape(1), T = x.shape(2), D = x.shape(3);
    if (D % 2) op.wrong(arg, "an even head size D, got " + std::to_string(D));
    const Floats cos = op.floats("cos", cos_, "(P, D/2)", {ANY, D / 2});
    const Floats sin = op.floats("sin", sin_, "(P, D/2)", {cos.shape(0), D / 2});
    const Ints positions = op.ints("positions", positions_, "(B, T)", {B, T}, 0, cos.shape(0));
    Strided y = empty_heads(B, H, T, D);
    run(x.size(), kernels().rope, x, cos, sin, positions, direction, y, B, H, T, D);
    return y;
}
static Strided rope_forward(const py::array& x, const py::array& cos, const py::array& sin,
                            const py::array& positions) {
    return turn(Op("rope_forward"), "x", x, cos, sin, positions, 1);
}
static Strided rope_backward(const py::array& dy, const py::array& cos, const py::array& sin,
                             const py::array& positions) {
    return turn(Op("rope_backward"), "dy", dy, cos, sin, positions, -1);
}

static Floats softmax_forward(const py::array& x_) {
    const Floats x = Op("softmax_forward").floats("x", x_);
    Floats y = empty(shape_of(x));
    run(x.size(), kernels().softmax_forward, x, y, rows_of(x), last_of(x));
    return y;
}

static Floats softmax_backward(const py::array& dy_, const py::array& y_) {
    const Op op("softmax_backward");
    const Floats y = op.floats("y", y_), dy = op.floats("dy", dy_, "the shape of y", shape_of(y));
    Floats dx = empty(shape_of(y));
    run(y.size(), kernels().softmax_backward, dy, y, dx, rows_of(y), last_of(y));
    return dx;
}

struct AttentionInputs {
    const Op op;
    Strided q, k, v, prefix_k, prefix_v;
    Ints start, gap, prefix;
    Attention x;

    AttentionInputs(const char* name, const py::array& q_, const py::array& k_, const py::array& v_,
                    const Optional& start_, const Optional& gap_ = {})
        : op(name),
          q(op.strided("q", q_, "(B, H, T, D)", {ANY, ANY, ANY, ANY})),
          k(op.strided("k", k_, "(B, G, S, D)", {q.shape(0), ANY, ANY, q.shape(3)})),
          v(op.strided("v", v_, "(B, G, S, D)", shape_of(k))) {
        const long B = q.shape(0), H = q.shape(1), G = k.shape(1), T = q.shape(2);
        if (G == 0 || H % G)
            op.wrong("k", "G dividing H = " + std::to_string(H) + ", got G = " + std::to_string(G));
        x = {B, H, G, T, k.shape(2), q.shape(3), raw(q), raw(k), raw(v)};
        constexpr long LIMIT = std::numeric_limits<int32_t>::max();
        if (start_)
            x.start = raw(start = op.ints("start", *start_, "(B, T)", {B, T}, -LIMIT, LIMIT));
        if (gap_) x.gap = raw(gap = op.ints("gap", *gap_, "(B, T, 2)", {B, T, 2}, -LIMIT, LIMIT));
    }
    void stand_after(const py::array& k_, const py::array& v_, const py::array& rows) {
        prefix_k = op.strided("prefix_k", k_, "(P, G, S, D)", {ANY, x.G, ANY, x.D});
        prefix_v = op.strided("prefix_v", v_, "(P, G, S, D)", shape_of(prefix_k));
        prefix = op.ints("prefix", rows, "(B)", {x.B}, 0, prefix_k.shape(0));
        x.shared = prefix_k.shape(2);
        x.S += x.shared;
        x.prefix_k = raw(prefix_k), x.prefix_v = raw(prefix_v), x.prefix = raw(prefix);
    }
    double work() const { return 1.0 * q.size() * x.S; }

    py::tuple forward() const {
        Strided out = empty_heads(x.B, x.H, x.T, x.D);
        Floats lse = empty({x.B, x.H, x.T});
        run(work(), kernels().attention_forward, x, out, lse);
        return py::make_tuple(out, lse);
    }
};

static py::tuple attention_forward(const py::array& q, const py::array& k, const py::array& v,
                                   const Optional& start, const Optional& gap) {
    return AttentionInputs("attention_forward", q, k, v, start, gap).forward();
}

static py::object prefix_attention(const py::array& q, const py::array& k, const py::array& v,
                                   const py::array& prefix_k, const py::array& prefix_v,
                                   const py::array& prefix, const Optional& start) {
    AttentionInputs in("prefix_attention", q, k, v, start);
    in.stand_after(prefix_k, prefix_v, prefix);
    return in.forward()[0];
}

static py::tuple attention_backward(const py::array& dout_, const py::array& q, const py::array& k,
                                    const py::array& v, const py::array& out_,
                                    const py::array& lse_, const Optional& start,
                                    const Optional& gap) {
    const AttentionInputs in("attention_backward", q, k, v, start, gap);
    const Attention& x = in.x;
    const Strided dout = in.op.strided("dout", dout_, "(B, H, T, D)", shape_of(in.q));
    const Strided out = in.op.strided("out", out_, "(B, H, T, D)", shape_of(in.q));
    const Floats lse = in.op.floats("lse", lse_, "(B, H, T)", {x.B, x.H, x.T});
    // Where q, k and v lie side by side, their gradients do.
    const long width = (x.H + 2 * x.G) * x.D;
    const bool beside = x.q.t == width && x.k.t == width && x.v.t == width && x.q.h == x.D &&
                        x.k.data == x.q.data + x.H * x.D && x.v.data == x.k.data + x.G * x.D;
    Strided dq, dk, dv;
    if (beside && x.T == x.S) {
        const Floats rows = empty({x.B, x.T, width});
        dq = heads_of(rows, 0, x.H, x.D), dk = heads_of(rows, x.H, x.G, x.D);
        dv = heads_of(rows, x.H + x.G, x.G, x.D);
    } else {
        dq = empty_heads(x.B, x.H, x.T, x.D), dk = empty_heads(x.B, x.G, x.S, x.D);
        dv = empty_heads(x.B, x.G, x.S, x.D);
    }
    run(in.work(), kernels().attention_backward, x, dout, out, lse, dq, dk, dv);
    return py::make_tuple(dq, dk, dv);
}

// ---- sums and activations ----------------------------------------------------------------------

static Floats add(const py::array& x_, const py::array& y_) {
    const Op op("add");
    const Floats x = op.floats("x", x_), y = op.floats("y", y_, "the shape of x", shape_of(x));
    Floats sum = empty(shape_of(x));
    run(x.size(), kernels().add, x, y, sum, x.size());
    return sum;
}

static Floats swiglu_forward(const py::array& gate_, const py::array& up_) {
    const Op op("swiglu_forward");
    const Floats gate = op.floats("gate", gate_),
                 up = op.floats("up", up_, "the shape of gate", shape_of(gate));
    Floats y = empty(shape_of(gate));
    run(gate.size(), kernels().swiglu_forward, gate, up, y, gate.size());
    return y;
}

static py::tuple swiglu_backward(const py::array& dy_, const py::array& gate_, const py::array& up_,
                                 const Optional& dgate_) {
    const Op op("swiglu_backward");
    const Floats gate = op.floats("gate", gate_),
                 up = op.floats("up", up_, "the shape of gate", shape_of(gate));
    const Floats dy = op.floats("dy", dy_, "the shape of gate", shape_of(gate));
    Floats dgate = op.place("dgate", dgate_, shape_of(gate)), dup = empty(shape_of(gate));
    run(gate.size(), kernels().swiglu_backward, dy, gate, up, dgate, dup, gate.size());
    return py::make_tuple(dgate, dup);
}

static Floats gelu_forward(const py::array& x_, bool approximate) {
    const Floats x = Op("gelu_forward").floats("x", x_);
    Floats y = empty(shape_of(x));
    run(x.size(), kernels().gelu_forward, x, y, x.size(), approximate);
    return y;
}

static Floats gelu_backward(const py::array& dy_, const py::array& x_, bool approximate,
                            const Optional& dx_) {
    const Op op("gelu_backward");
    const Floats x = op.floats("x", x_), dy = op.floats("dy", dy_, "the shape of x", shape_of(x));
    Floats dx = op.place("dx", dx_, shape_of(x));
    run(x.size(), kernels().gelu_backward, dy, x, dx, x.size(), approximate);
    return dx;
}

// ---- loss --------------------------------------------------------------------------------------

static py::tuple cross_entropy_forward(const py::array& logits_, const py::array& targets_) {
    const Op op("cross_entropy_forward");
    const Floats logits = op.floats("logits", logits_);
    const Shape rows = leading(logits);
    const Ints targets = op.ints("targets", targets_, "(...)", rows, -1, last_of(logits));
    Floats loss = empty(rows), lse = empty(rows);
    run(logits.size(), kernels().cross_entropy_forward, logits, targets, loss, lse, rows_of(logits),
        last_of(logits));
    return py::make_tuple(loss, lse);
}

static Floats cross_entropy_backward(const py::array& dloss_, const py::array& logits_,
                                     const py::array& targets_, const py::array& lse_) {
    const Op op("cross_entropy_backward");
    const Floats logits = op.floats("logits", logits_);
    const Shape rows = leading(logits);
    const Ints targets = op.ints("targets", targets_, "(...)", rows, -1, last_of(logits));
    const Floats dloss = op.floats("dloss", dloss_, "(...)", rows),
                 lse = op.floats("lse", lse_, "(...)", rows);
    Floats dlogits = empty(shape_of(logits));
    run(logits.size(), kernels().cross_entropy_backward, dloss, logits, targets, lse, dlogits,
        rows_of(logits), last_of(logits));
    return dlogits;
}

static py::tuple linear_cross_entropy_forward(const py::array& x_, const py::array& weight_,
                                              const py::array& targets_) {
    const Op op("linear_cross_entropy_forward");
    const Floats x = op.floats("x", x_),
                 weight = op.floats("weight", weight_, "(V, C)", {ANY, last_of(x)});
    const long N = rows_of(x), C = last_of(x), V = weight.shape(0);
    const Ints targets = op.ints("targets", targets_, "(...)", leading(x), -1, V);
    Floats loss = empty(leading(x)), lse = empty(leading(x));
    run(1.0 * N * C * V, kernels().linear_cross_entropy_forward, x, weight, targets, loss, lse, N,
        C, V);
    return py::make_tuple(loss, lse);
}

static py::tuple linear_cross_entropy_backward(const py::array& dloss_, const py::array& x_,
                                               const py::array& weight_, const py::array& targets_,
                                               const py::array& lse_) {
    const Op op("linear_cross_entropy_backward");
    const Floats x = op.floats("x", x_),
                 weight = op.floats("weight", weight_, "(V, C)", {ANY, last_of(x)});
    const long N = rows_of(x), C = last_of(x), V = weight.shape(0);
    const Ints targets = op.ints("targets", targets_, "(...)", leading(x), -1, V);
    const Floats dloss = op.floats("dloss", dloss_, "(...)", leading(x));
    const Floats lse = op.floats("lse", lse_, "(...)", leading(x));
    Floats dx = empty(shape_of(x)), dweight = empty({V, C});
    run(1.0 * N * C * V, kernels().linear_cross_entropy_backward, dloss, x, weight, targets, lse,
        dx, dweight, N, C, V);
    return py::make_tuple(dx, dweight);
}

static py::tuple linear_cross_entropy_with_gradients(const py::array& x_, const py::array& weight_,
                                                     const py::array& targets_) {
    const Op op("linear_cross_entropy_with_gradients");
    const Floats x = op.floats("x", x_),
                 weight = op.floats("weight", weight_, "(V, C)", {ANY, last_of(x)});
    const long N = rows_of(x), C = last_of(x), V = weight.shape(0);
    const Ints targets = op.ints("targets", targets_, "(...)", leading(x), -1, V);
    Floats loss = empty(leading(x)), lse = empty(leading(x)), dx = empty(shape_of(x)),
           dweight = empty({V, C});
    run(1.0 * N * C * V, kernels().linear_cross_entropy_with_gradients, x, weight, targets, loss,
        lse, dx, dweight, N, C, V);
    return py::make_tuple(loss, lse, dx, dweight);
}

// ---- optimizer ---------------------------------------------------------------------------------

static void adamw(const py::array& param_, const py::array& grad_, const py::array& m_,
                  const py::array& v_, double lr, double beta1, double beta2, double eps,
                  double weight_decay, long step, double grad_scale) {
    const Op op("adamw");
    if (step < 1) op.wrong("step", "at least 1, got " + std::to_string(step));
    const Shape shape = shape_of(param_);
    const Floats param = op.in_place("param", param_, shape), m = op.in_place("m", m_, shape),
                 v = op.in_place("v", v_, shape),
                 grad = op.floats("grad", grad_, "the shape of param", shape);
    const AdamW constants = {float(lr),
                             float(1 - beta1),
                             float(1 - beta2),
                             float(1 / (1 - std::pow(beta1, step))),
                             float(1 / (1 - std::pow(beta2, step))),
                             float(eps),
                             float(weight_decay),
                             float(grad_scale)};
    run(param.size(), kernels().adamw, constants, param, grad, m, v, param.size());
}

using Moved = std::tuple<py::array, py::array, py::array>;  // param, grad, m

static void muon(const std::vector<Moved>& matrices, double lr, double beta1, double weight_decay,
                 double grad_scale) {
    const Op op("muon");
    std::vector<Floats> grads;  // some of which may be copies
    std::vector<MuonMatrix> moved;
    double work = 0;
    for (const auto& [param, grad, m] : matrices) {
        const Floats w = op.in_place("param", param, shape_of(param));
        op.check("param", w, "(M, N)", {ANY, ANY});
        grads.push_back(op.floats("grad", grad, "the shape of param", shape_of(w)));
        const Floats momentum = op.in_place("m", m, shape_of(w));
        moved.push_back({raw(w), raw(grads.back()), raw(momentum), w.shape(0), w.shape(1)});
        work += w.size();
    }
    const Muon constants = {lr, weight_decay, float(beta1), float(grad_scale)};
    run(work, kernels().muon, constants, moved.data(), (long)moved.size());
}

static double global_norm(const py::iterable& arrays) {
    const Op op("global_norm");
    double total = 0;
    for (const py::handle& item : arrays) {
        const py::array x_(py::reinterpret_borrow<py::object>(item));
        const Floats x = op.floats("arrays", x_, "the shape of itself", shape_of(x_));
        total += run(x.size(), kernels().sum_squares, x, x.size());
    }
    return std::sqrt(total);
}

// ---- the module --------------------------------------------------------------------------------

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "The kernels of tinylm.kernels.reference in C++ with OpenMP, float32.";
    survive_fork();

    m.def(
        "isas",
        [] {
            std::vector<std::string> names;
            for (const Kernels* k : supported()) names.push_back(k->name);
            return names;
        },
        "Instruction sets that this machine supports, best first.");
    m.def("isa", [] { return kernels().name; }, "The instruction set in use.");
    m.def("use_isa", &use_isa, "name"_a);
    m.attr("openmp") = PARALLEL;
    m.def("threads", [] { return threads; });
    m.def("set_threads", &set_threads, "n"_a,
          "No effect in a child of fork, which has one thread.");
    m.def("set_products", &set_products, "dtype"_a,
          "float32, or bfloat16: operands of large products are rounded, sums stay float32.");
    m.def(
        "peak", [](int threads) { return call(kernels().peak, threads); }, "threads"_a,
        "Multiply-adds on registers for about 0.1 s; returns the number of operations.");
    m.def(
        "read",
        [](const py::array& x_, int threads) {
            const Floats x = Op("read").floats("x", x_);
            return call(kernels().read, x, x.size(), threads);
        },
        "x"_a, "threads"_a, "One pass over x; returns its sum.");
    m.def(
        "copy",
        [](const py::array& x_, int threads) {
            const Floats x = Op("copy").floats("x", x_);
            Floats y = empty(shape_of(x));
            call(kernels().copy, x, y, x.size(), threads);
            return y;
        },
        "x"_a, "threads"_a, "A copy of x, from the pool.");
    m.def(
        "barriers", [](int threads) { return call(kernels().barriers, threads); }, "threads"_a,
        "Threads waiting for each other, again and again; returns how often.");
    m.def("empty", &empty, "shape"_a, "A float32 array from the pool, not initialised.");
    m.def("pool_bytes", [] { return pool.bytes(); }, "What the pool holds, in use and idle.");

    py::class_<PackedWeights>(m, "PackedWeights")
        .def(
            py::init<long>(), "rows"_a,
            "`with` one of these, linear_forward packs each weight once, if that pays for products "
            "of so many rows. Nothing may change the weights as long as it is used.")
        .def("__enter__", &PackedWeights::enter)
        .def("__exit__", &PackedWeights::leave);

    m.def("add", &add, "x"_a, "y"_a);
    m.def("matmul", &matmul, "a"_a, "b"_a, "transpose_a"_a = false, "transpose_b"_a = false);
    m.def("linear_forward", &linear_forward, "x"_a, "weight"_a, "bias"_a = py::none(),
          "transposed"_a = false);
    m.def("linear_backward", &linear_backward, "dy"_a, "x"_a, "weight"_a, "transposed"_a = false,
          "has_bias"_a = false, "dx"_a = py::none());
    m.def("embedding_forward", &embedding_forward, "tokens"_a, "weight"_a);
    m.def("embedding_backward", &embedding_backward, "dy"_a, "tokens"_a, "vocab_size"_a,
          "total"_a = py::none());
    m.def("rms_norm_forward", &rms_norm_forward, "x"_a, "weight"_a, "eps"_a);
    m.def("rms_norm_backward", &rms_norm_backward, "dy"_a, "x"_a, "weight"_a, "rstd"_a);
    m.def("layer_norm_forward", &layer_norm_forward, "x"_a, "weight"_a, "bias"_a, "eps"_a);
    m.def("layer_norm_backward", &layer_norm_backward, "dy"_a, "x"_a, "weight"_a, "mean"_a,
          "rstd"_a);
    m.def("rope_forward", &rope_forward, "x"_a, "cos"_a, "sin"_a, "positions"_a);
    m.def("rope_backward", &rope_backward, "dy"_a, "cos"_a, "sin"_a, "positions"_a);
    m.def("softmax_forward", &softmax_forward, "x"_a);
    m.def("softmax_backward", &softmax_backward, "dy"_a, "y"_a);
    m.def("attention_forward", &attention_forward, "q"_a, "k"_a, "v"_a, "start"_a = py::none(),
          "gap"_a = py::none());
    m.def("prefix_attention", &prefix_attention, "q"_a, "k"_a, "v"_a, "prefix_k"_a, "prefix_v"_a,
          "prefix"_a, "start"_a = py::none());
    m.def("attention_backward", &attention_backward, "dout"_a, "q"_a, "k"_a, "v"_a, "out"_a,
          "lse"_a, "start"_a = py::none(), "gap"_a = py::none());
    m.def("swiglu_forward", &swiglu_forward, "gate"_a, "up"_a);
    m.def("swiglu_backward", &swiglu_backward, "dy"_a, "gate"_a, "up"_a, "dgate"_a = py::none());
    m.def("gelu_forward", &gelu_forward, "x"_a, "approximate"_a = true);
    m.def("gelu_backward", &gelu_backward, "dy"_a, "x"_a, "approximate"_a = true,
          "dx"_a = py::none());
    m.def("cross_entropy_forward", &cross_entropy_forward, "logits"_a, "targets"_a);
    m.def("cross_entropy_backward", &cross_entropy_backward, "dloss"_a, "logits"_a, "targets"_a,
          "lse"_a);
    m.def("linear_cross_entropy_forward", &linear_cross_entropy_forward, "x"_a, "weight"_a,
          "targets"_a);
    m.def("linear_cross_entropy_backward", &linear_cross_entropy_backward, "dloss"_a, "x"_a,
          "weight"_a, "targets"_a, "lse"_a);
    m.def("linear_cross_entropy_with_gradients", &linear_cross_entropy_with_gradients, "x"_a,
          "weight"_a, "targets"_a);
    m.def("adamw", &adamw, "param"_a, "grad"_a, "m"_a, "v"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a,
          "weight_decay"_a, "step"_a, "grad_scale"_a = 1.0);
    m.def("muon", &muon, "matrices"_a, "lr"_a, "beta1"_a, "weight_decay"_a, "grad_scale"_a = 1.0);
    m.def("global_norm", &global_norm, "arrays"_a);
}
