// The entry point through which the stand-in driver runs emulated kernels.
#include "emulation.hpp"

extern "C" int emulated_launch(const char* name, unsigned across, unsigned down, unsigned threads, void** parameters) {
    const auto found = emulation::kernels().find(name);
    if (found == emulation::kernels().end()) return 500;
    gridDim = {across, down, 1};
    blockDim = {threads, 1, 1};
    emulation::body = [&] { found->second(parameters); };
    // A GPU may run blocks in any order: here from last to first.
    for (unsigned y = down; y-- > 0;) {
        for (unsigned x = across; x-- > 0;) {
            blockIdx = {x, y, 0};
            emulation::run_block(threads);
        }
    }
    return 0;
}
