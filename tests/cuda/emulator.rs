//! Launches on the host, and the memory that they see.

#![allow(unsafe_code)] // calls of the emulator, and memory that it writes

use std::{
    cell::RefCell,
    collections::BTreeMap,
    ffi::{CString, c_char, c_void},
    path::Path,
    sync::Mutex,
};

use bitnet_model::cuda::launch::{Address, Arg, Launch};
use ptx_interpreter::{block::Order, memory::Memory};

use super::interpreter;

#[link(name = "cuda_emulator", kind = "static")]
unsafe extern "C" {
    fn emulator_launch(
        name: *const c_char,
        sm75: bool,
        grid: *const u32,
        threads: u32,
        args: *mut *mut c_void,
        schedule: u32,
    ) -> bool;
    fn emulator_allocate(bytes: usize) -> *mut c_void;
    fn emulator_free(memory: *mut c_void, bytes: usize);
}

/// The emulator has one device.
static DEVICE: Mutex<()> = Mutex::new(());

thread_local! {
    /// Addresses and sizes of the buffers of a test, which has a thread of its own.
    static BUFFERS: RefCell<BTreeMap<u64, usize>> = const { RefCell::new(BTreeMap::new()) };
}

/// Memory of the device, behind which there is none.
pub struct Buffer<T> {
    memory: *mut T,
    len: usize,
}

impl<T: Copy> Buffer<T> {
    pub fn new(data: &[T]) -> Self {
        // SAFETY: any size will do.
        let memory = unsafe { emulator_allocate(size_of_val(data)) }.cast::<T>();
        assert!(!memory.is_null(), "no memory");
        assert!(memory.is_aligned(), "elements do not fill their memory");
        // SAFETY: the memory is new, aligned, and as long as the data.
        unsafe { memory.copy_from_nonoverlapping(data.as_ptr(), data.len()) };
        BUFFERS.with_borrow_mut(|all| all.insert(memory as u64, size_of_val(data)));
        Self { memory, len: data.len() }
    }

    pub fn address(&self) -> Address {
        self.memory as Address
    }

    pub fn read(&self) -> Vec<T> {
        // SAFETY: initialized by `new`; a launch that writes has ended.
        unsafe { std::slice::from_raw_parts(self.memory, self.len) }.to_vec()
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        BUFFERS.with_borrow_mut(|all| all.remove(&(self.memory as u64)));
        // SAFETY: allocated with this size.
        unsafe { emulator_free(self.memory.cast(), self.len * size_of::<T>()) };
    }
}

/// In which order the threads of a block take turns: `Schedule` in `fibers.cpp`.
#[repr(u32)]
#[derive(Clone, Copy, Debug)]
enum Schedule {
    Ascending,
    Descending,
    Shuffled,
    Warps,
    WarpsDescending,
}

/// How a launch is carried out.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// With the matrix instruction of sm_75.
    sm75: bool,
    schedule: Schedule,
}

impl Run {
    /// One order of threads, for results.
    pub const ONE: [Self; 1] = [Self::in_order(Schedule::Shuffled)];
    /// All orders, for barriers.
    pub const ALL: [Self; 5] = [
        Self::in_order(Schedule::Ascending),
        Self::in_order(Schedule::Descending),
        Self::in_order(Schedule::Shuffled),
        Self::in_order(Schedule::Warps),
        Self::in_order(Schedule::WarpsDescending),
    ];
    /// On sm_75.
    pub const SM75: [Self; 1] = [Self { sm75: true, schedule: Schedule::Shuffled }];

    const fn in_order(schedule: Schedule) -> Self {
        Self { sm75: false, schedule }
    }
}

/// Carries out a launch: here, or, where the environment names a folder of PTX, by executing that.
pub fn run(launch: &Launch, how: Run) {
    if launch.is_empty() {
        return;
    }
    if let Some(folder) = std::env::var_os("BITNET_CUDA_PTX") {
        return interpret(folder.as_ref(), launch, how);
    }
    let name = CString::new(launch.function).unwrap();
    let value = |arg| value_of(arg).as_ptr().cast_mut().cast();
    let mut args: Vec<*mut c_void> = launch.args.iter().map(value).collect();
    let device = DEVICE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // SAFETY: the arguments are those of the kernel, which the test checks by its results, and the grid has three dimensions.
    let found = unsafe {
        emulator_launch(
            name.as_ptr(),
            how.sm75,
            launch.grid.as_ptr(),
            launch.block,
            args.as_mut_ptr(),
            how.schedule as u32,
        )
    };
    drop(device);
    assert!(found, "no kernel {}", launch.function);
}

/// Executes the PTX of a launch over copies of all buffers.
fn interpret(folder: &Path, launch: &Launch, how: Run) {
    let order = match how.schedule {
        Schedule::Descending | Schedule::WarpsDescending => Order::Descending,
        Schedule::Ascending | Schedule::Shuffled | Schedule::Warps => Order::Ascending,
    };
    let (mut memory, file) = (Memory::new(), (launch.file, how.sm75));
    let args = Vec::from_iter(launch.args.iter().map(value_of));
    BUFFERS.with_borrow(|buffers| {
        for (address, size) in buffers {
            // SAFETY: a buffer of this thread, initialized by `new`.
            let bytes = unsafe { std::slice::from_raw_parts(*address as *const u8, *size) };
            memory.place(*address, bytes.to_vec());
        }
        interpreter::run(folder, file, launch, &args, order, &mut memory);
        for (address, size) in buffers {
            let bytes = memory.bytes(*address, *size).unwrap();
            // SAFETY: as above; nothing refers to it now.
            unsafe { (*address as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), *size) };
        }
    });
}

/// The bytes of an argument.
fn value_of(arg: &Arg) -> &[u8] {
    fn of<T>(value: &T) -> &[u8] {
        // SAFETY: numbers, or structs of numbers; a kernel never looks at what is between them.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
    }
    match arg {
        Arg::U32(x) => of(x),
        Arg::F32(x) => of(x),
        Arg::U64(x) => of(x),
        Arg::Weights(x) => of(x),
        Arg::Activations(x) => of(x),
        Arg::Backward(x) => of(x),
        Arg::Attention(x) => of(x),
        Arg::Strides(x) => of(x),
        Arg::DenseRows(x) => of(x),
        Arg::HeadActivations(x) => of(x),
        Arg::HeadMatrix(x) => of(x),
        Arg::Factor(x) => of(x),
        Arg::Gemm(x) => of(x),
    }
}
