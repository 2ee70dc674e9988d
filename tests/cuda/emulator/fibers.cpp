// Launches on the host: block after block, each thread a fiber.
//
// A fiber runs until it waits; then another one does. In which order they take their turns is the caller's to choose: a
// result that depends on it lacks a barrier. Memory of the device ends at a page that cannot be touched.

#include "shim.hpp"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

Index threadIdx, blockIdx, blockDim, gridDim;
extern const Kernel kernels[], kernels_sm75[];
extern "C" char __start_shared_memory[], __stop_shared_memory[];

namespace {

constexpr unsigned MAX_THREADS = 1024;
constexpr size_t STACK = 128 << 10;

/// A meeting of `size` fibers.
struct Barrier {
    unsigned size, arrived, generation;
};

struct Warp {
    Barrier barrier;
    Exchanged exchanged[2];
};

struct Fiber {
    enum { NEW, WAITING, DONE } state;
    jmp_buf at;
    unsigned exchanges;
};

Fiber fibers[MAX_THREADS];
Warp warps[MAX_THREADS / 32];
Barrier block_barrier;
jmp_buf scheduler;
Fiber* current;
char* stacks;
const Kernel* kernel;
void** arguments;
/// Whether any fiber got past a barrier or ended since this was last set to false.
bool progress;
/// Fibers that have not ended.
unsigned running;

[[noreturn]] void die(const char* what) {
    fprintf(stderr, "emulator: %s in %s, block (%u, %u, %u), thread %u\n", what, kernel->name, blockIdx.x, blockIdx.y,
            blockIdx.z, threadIdx.x);
    abort();
}

void yield() {
    if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}

void wait(Barrier& barrier) {
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        barrier.generation++;
    } else {
        for (unsigned generation = barrier.generation; barrier.generation == generation;) yield();
    }
    progress = true;
}

void run_thread() {
    kernel->call(arguments);
    current->state = Fiber::DONE;
    running--;
    progress = true;
    _longjmp(scheduler, 1);
}

void start(unsigned thread) {
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + thread * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, run_thread, 0);
    current->state = Fiber::WAITING;
    setcontext(&context);
}

void resume(unsigned thread) {
    threadIdx = {thread, 0, 0};
    current = &fibers[thread];
    if (_setjmp(scheduler) != 0) return;
    if (current->state == Fiber::NEW) start(thread);
    _longjmp(current->at, 1);
}

/// In which order threads take turns.
enum Schedule : unsigned {
    /// All threads, the first one first.
    ASCENDING,
    /// The last one first.
    DESCENDING,
    /// Anew in each round.
    SHUFFLED,
    /// A warp as far as it gets, then the next one: the last one to reach a barrier is ahead of all others then.
    WARPS,
    /// The last warp first.
    WARPS_DESCENDING,
};

/// The order of turns of a round.
struct Turns {
    unsigned order[MAX_THREADS];
    unsigned count, random;
    Schedule schedule;

    void begin(unsigned threads, Schedule kind) {
        count = threads;
        schedule = kind;
        random = 1;
        bool descending = kind == DESCENDING || kind == WARPS_DESCENDING;
        for (unsigned i = 0; i < count; i++) order[i] = descending ? count - 1 - i : i;
    }

    void shuffle() {
        for (unsigned i = count; i > 1; i--) {
            random = random * 1664525 + 1013904223; // Numerical Recipes, 7.1
            unsigned j = random / 65536 % i, other = order[j];
            order[j] = order[i - 1];
            order[i - 1] = other;
        }
    }
};

/// A turn for each of some threads; returns whether any of them got on.
bool turns_of(const unsigned* order, unsigned count) {
    progress = false;
    for (unsigned i = 0; i < count; i++) {
        if (fibers[order[i]].state != Fiber::DONE) resume(order[i]);
    }
    return progress;
}

/// A turn for each thread, or for each warp all turns that it can take.
bool round_of(Turns& turns) {
    if (turns.schedule == SHUFFLED) turns.shuffle();
    if (turns.schedule < WARPS) return turns_of(turns.order, turns.count);
    bool any = false;
    for (unsigned first = 0; first < turns.count; first += 32) {
        while (turns_of(turns.order + first, min(32, turns.count - first))) any = true;
    }
    return any;
}

void run_block(Turns& turns) {
    memset(__start_shared_memory, 0xff, size_t(__stop_shared_memory - __start_shared_memory));
    block_barrier = {turns.count, 0, 0};
    for (unsigned warp = 0; warp * 32 < turns.count; warp++) warps[warp].barrier = {min(32, turns.count - 32 * warp), 0, 0};
    for (unsigned i = 0; i < turns.count; i++) fibers[i].state = Fiber::NEW, fibers[i].exchanges = 0;
    running = turns.count;
    while (running > 0) {
        if (!round_of(turns)) die("threads wait for each other for ever");
    }
}

const Kernel* find(const Kernel* list, const char* name) {
    for (; list->name; list++) {
        if (strcmp(list->name, name) == 0) return list;
    }
    return nullptr;
}

} // namespace

void __syncthreads() { wait(block_barrier); }

void __syncwarp() { wait(warps[threadIdx.x / 32].barrier); }

const Exchanged& exchange(const uint32_t* words, unsigned count) {
    Warp& warp = warps[threadIdx.x / 32];
    Exchanged& exchanged = warp.exchanged[current->exchanges++ % 2];
    memcpy(exchanged[threadIdx.x % 32], words, count * sizeof *words);
    wait(warp.barrier);
    return exchanged;
}

/// Runs a kernel; `sm75` takes that variant if there is one. Returns whether there is such a kernel. One thread at a time.
extern "C" bool emulator_launch(const char* name, bool sm75, const unsigned* grid, unsigned threads, void** args, unsigned schedule) {
    const Kernel* variant = sm75 ? find(kernels_sm75, name) : nullptr;
    kernel = variant ? variant : find(kernels, name);
    if (!kernel || threads > MAX_THREADS) return false;
    if (!stacks) {
        void* memory = mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) die("no memory for stacks");
        stacks = static_cast<char*>(memory);
    }
    arguments = args;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    static Turns turns;
    turns.begin(threads, static_cast<Schedule>(schedule));
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                run_block(turns);
            }
    return true;
}

/// Memory that ends where a page begins that cannot be touched; null if there is none.
extern "C" void* emulator_allocate(size_t bytes) {
    size_t page = size_t(sysconf(_SC_PAGESIZE)), body = (bytes + page - 1) / page * page;
    char* memory = static_cast<char*>(mmap(nullptr, body + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED || mprotect(memory + body, page, PROT_NONE) != 0) return nullptr;
    return memory + body - bytes;
}

extern "C" void emulator_free(void* memory, size_t bytes) {
    size_t page = size_t(sysconf(_SC_PAGESIZE)), body = (bytes + page - 1) / page * page;
    munmap(static_cast<char*>(memory) + bytes - body, body + page);
}
