// One kernel as a shared library: -DKERNEL is its name, -DSOURCE its file.
#include "ptx.cuh"

#include SOURCE

#include <utility>

namespace {

void** arguments;

template <class... Types, size_t... I>
void call(void (*kernel)(Types...), std::index_sequence<I...>)
{
    kernel(*static_cast<Types*>(arguments[I])...);
}

template <class... Types>
void call(void (*kernel)(Types...))
{
    call(kernel, std::index_sequence_for<Types...>());
}

void body() { call(&KERNEL); }

} // namespace

// Runs a grid, block after block. `values` points to the kernel's arguments, as cuLaunchKernel's kernelParams do.
// Returns null, or what went wrong.
extern "C" const char* emulate(unsigned x, unsigned y, unsigned z, int threads, int order, void** values)
{
    arguments = values;
    emulator::block.body = body;
    emulator::block.failure.clear();
    emulator::grid_size = {x, y, z};
    for (unsigned i = 0; i < x * y * z; ++i) {
        emulator::block_index = {i % x, i / x % y, i / x / y};
        if (!emulator::run_block(threads, order))
            return emulator::block.failure.c_str();
    }
    return nullptr;
}
