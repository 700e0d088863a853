// Runs problems that it reads from its input, to test the kernels under an emulator of another processor.
//
// A problem is 27 numbers of 64 bits (type, whether there is a bias, whether it comes last, and the geometry as
// jaxdw/native/plain.cc has it), then x, kernel, bias and dy. The output is y and the gradient by the kernel.
//
// With the argument `training` a problem is 4 numbers (type, rows, channels, activation), then x, scale, bias, dy, labels
// and the loss's cotangent. The output is that of each kernel of a training step.
#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" int jaxdw_conv(const char*, int64_t, int, const int64_t*, const void*, const void*, const void*, int,
                          const void*, const void*, const void*, int, void*);
extern "C" int jaxdw_kernel_gradient(const char*, int64_t, int, const int64_t*, const void*, const void*, void*);

extern "C" int jaxdw_batch_norm(const char*, int64_t, int, int64_t, int64_t, double, int, const void*, const void*,
                                const void*, void*, void*, void*);
extern "C" int jaxdw_batch_norm_gradient(const char*, int64_t, int, int64_t, int64_t, double, int, const void*,
                                         const void*, const void*, const void*, const void*, const void*, void*, void*,
                                         void*);
extern "C" int jaxdw_cross_entropy(const char*, int64_t, int, int64_t, int64_t, const void*, const int32_t*, const void*,
                                   void*);
extern "C" int jaxdw_axpby(const char*, int64_t, int, int64_t, const void*, const void*, const void*, void*);

int train(const char* isa) {
  int64_t numbers[4];
  while (std::fread(numbers, sizeof numbers, 1, stdin) == 1) {
    const int64_t sizes[] = {4, 8, 2, 2}, size = sizes[numbers[0]], wide = size == 8 ? 8 : 4;
    const int64_t rows = numbers[1], channels = numbers[2], count = rows * channels;
    const int type = int(numbers[0]), activation = int(numbers[3]);
    auto read = [](int64_t bytes) {
      std::vector<char> all(bytes);
      if (std::fread(all.data(), 1, all.size(), stdin) != all.size()) std::fputs("too short\n", stderr);
      return all;
    };
    std::vector<char> x = read(count * size), scale = read(channels * wide), bias = read(channels * wide),
                      dy = read(count * size), labels = read(rows * 4), ct = read(size), y(x.size()), mean(scale.size()),
                      var(scale.size()), dx(x.size()), dscale(scale.size()), dbias(scale.size()), loss(size),
                      dlogits(x.size()), sum(x.size()), factors(scale.begin(), scale.begin() + wide);
    factors.insert(factors.end(), scale.begin(), scale.begin() + wide);
    const int32_t* of_rows = reinterpret_cast<const int32_t*>(labels.data());
    int failure = jaxdw_batch_norm(isa, 2, type, rows, channels, 1e-5, activation, x.data(), scale.data(), bias.data(),
                                   y.data(), mean.data(), var.data());
    failure |= jaxdw_batch_norm_gradient(isa, 2, type, rows, channels, 1e-5, activation, x.data(), scale.data(),
                                         bias.data(), mean.data(), var.data(), dy.data(), dx.data(), dscale.data(),
                                         dbias.data());
    failure |= jaxdw_cross_entropy(isa, 1, type, rows, channels, x.data(), of_rows, nullptr, loss.data());
    failure |= jaxdw_cross_entropy(isa, 1, type, rows, channels, x.data(), of_rows, ct.data(), dlogits.data());
    failure |= jaxdw_axpby(isa, 1, type, count, factors.data(), x.data(), dy.data(), sum.data());
    if (failure) return failure;
    for (const auto* result : {&y, &mean, &var, &dx, &dscale, &dbias, &loss, &dlogits, &sum})
      std::fwrite(result->data(), 1, result->size(), stdout);
  }
  return 0;
}

int main(int count_of_arguments, char** arguments) {
  if (count_of_arguments > 2) return train(arguments[1]);
  int64_t numbers[27];
  while (std::fread(numbers, sizeof numbers, 1, stdin) == 1) {
    const int64_t sizes[] = {4, 8, 2, 2}, size = sizes[numbers[0]];
    const int64_t* geometry = numbers + 3;
    auto count = [&](int from) { return geometry[from] * geometry[from + 1] * geometry[from + 2] * geometry[1]; };
    auto read = [&](int64_t elements) {
      std::vector<char> bytes(elements * size);
      if (std::fread(bytes.data(), 1, bytes.size(), stdin) != bytes.size()) std::fputs("too short\n", stderr);
      return bytes;
    };
    std::vector<char> x = read(geometry[0] * count(2)), kernel = read(count(5)), bias = read(geometry[1] * numbers[1]),
                      dy = read(geometry[0] * count(8)), y(dy.size()), gradient(kernel.size());
    int failure = jaxdw_conv(arguments[1], 1, int(numbers[0]), geometry, x.data(), kernel.data(),
                             numbers[1] ? bias.data() : nullptr, int(numbers[2]), nullptr, nullptr, nullptr, 0, y.data());
    failure |= jaxdw_kernel_gradient(arguments[1], 2, int(numbers[0]), geometry, x.data(), dy.data(), gradient.data());
    if (failure) return failure;
    std::fwrite(y.data(), 1, y.size(), stdout);
    std::fwrite(gradient.data(), 1, gradient.size(), stdout);
  }
}
