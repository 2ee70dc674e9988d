//! Execution of a launch: blocks one after the other, the threads of a block in turn, each until it waits for others.

use crate::{
    collective::{self, WARP},
    instruction::{Access, Operation, Register, Shuffle, Source, Space, Special},
    memory::Memory,
    operation::Function,
    ptx::Kernel,
    shared::{Shared, When},
};

/// Instructions that a thread may execute: more is taken for a loop without an end.
const MOST_STEPS: u64 = 1 << 32;

/// The size of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Bytes of shared memory that the launch adds.
    pub shared: usize,
}

/// In which order the threads of a block take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // by their names
pub enum Order {
    Ascending,
    Descending,
}

/// Executes a launch with its parameters as bytes.
///
/// # Errors
/// What would be undefined on a device: an access outside of all memory or misaligned, a race in shared memory, threads that
/// wait for ever, an instruction that is not known. The message names kernel, block, thread and line of the PTX.
pub fn launch(
    kernel: &Kernel,
    size: Size,
    order: Order,
    params: &[u8],
    memory: &mut Memory,
) -> Result<(), String> {
    let [x, y, z] = size.grid;
    for block in (0..z).flat_map(|z| (0..y).flat_map(move |y| (0..x).map(move |x| [x, y, z]))) {
        Block::new(kernel, size, block, params, memory).run(order)?;
    }
    Ok(())
}

/// What a thread waits for.
enum Wait {
    Barrier,
    Warp(u32),
    Shuffle { to: Register, found: Option<Register>, mode: Shuffle, sources: [u64; 4] },
    Multiply { wide: bool, to: Vec<Register>, values: [Vec<u32>; 3], at: usize },
}

enum State {
    Runs,
    Waits(Wait),
    Ended,
}

struct Thread {
    registers: Vec<u64>,
    local: Vec<u8>,
    next: usize,
    state: State,
    when: When,
}

struct Block<'a> {
    kernel: &'a Kernel,
    size: Size,
    block: [u32; 3],
    params: &'a [u8],
    memory: &'a mut Memory,
    shared: Shared,
    threads: Vec<Thread>,
}

impl<'a> Block<'a> {
    fn new(
        kernel: &'a Kernel,
        size: Size,
        block: [u32; 3],
        params: &'a [u8],
        memory: &'a mut Memory,
    ) -> Self {
        let threads = size.block.iter().product::<u32>() as usize;
        let thread = |thread| Thread {
            registers: vec![0; kernel.registers],
            local: vec![0xff; kernel.local_bytes],
            next: 0,
            state: State::Runs,
            when: When { thread, barriers: 0, warp: 0 },
        };
        let threads = (0..threads).map(thread).collect();
        let shared = Shared::new(kernel.shared_bytes + size.shared);
        Self { kernel, size, block, params, memory, shared, threads }
    }

    fn run(mut self, order: Order) -> Result<(), String> {
        loop {
            let count = self.threads.len();
            for i in 0..count {
                let index = if order == Order::Ascending { i } else { count - 1 - i };
                self.advance(index).map_err(|what| self.error(index, &what))?;
            }
            if self.threads.iter().all(|thread| matches!(thread.state, State::Ended)) {
                return Ok(());
            }
            let mut moved = false;
            for first in (0..count).step_by(WARP) {
                moved |= self.meet(first).map_err(|what| self.error(first, &what))?;
            }
            if !moved && !self.pass_barrier() {
                let stuck = self.threads.iter().position(|t| matches!(t.state, State::Waits(_)));
                return Err(self.error(stuck.unwrap_or(0), "waits for threads that never come"));
            }
        }
    }

    fn error(&self, thread: usize, what: &str) -> String {
        let ([x, y, z], name) = (self.block, &self.kernel.name);
        let at = self.threads[thread].next.saturating_sub(1);
        let line = self.kernel.code[at].line;
        format!("{name}: block ({x}, {y}, {z}), thread {thread}, line {line} of the PTX: {what}")
    }

    /// Lets a thread run until it waits or ends.
    fn advance(&mut self, index: usize) -> Result<(), String> {
        let kernel = self.kernel;
        let mut steps = 0;
        while matches!(self.threads[index].state, State::Runs) {
            let thread = &mut self.threads[index];
            let instruction = &kernel.code[thread.next];
            thread.next += 1;
            if let Some((predicate, unless)) = instruction.guard
                && (thread.registers[predicate] & 1 != 0) == unless
            {
                continue;
            }
            self.execute(index, &instruction.operation)?;
            steps += 1;
            if steps > MOST_STEPS {
                return Err("does not end".into());
            }
        }
        Ok(())
    }

    fn value(&self, index: usize, source: Source) -> u64 {
        match source {
            Source::Register(register) => self.threads[index].registers[register],
            Source::Immediate(bits) => bits,
            Source::Special(special) => {
                let [x, y, _] = self.size.block;
                let thread = index as u32;
                u64::from(match special {
                    Special::Tid(axis) => [thread % x, thread / x % y, thread / x / y][axis],
                    Special::Ntid(axis) => self.size.block[axis],
                    Special::Ctaid(axis) => self.block[axis],
                    Special::Nctaid(axis) => self.size.grid[axis],
                    Special::Lane => thread % WARP as u32,
                })
            }
        }
    }

    fn words(&self, index: usize, sources: &[Source]) -> Vec<u32> {
        sources.iter().map(|source| self.value(index, *source) as u32).collect()
    }

    fn execute(&mut self, index: usize, operation: &Operation) -> Result<(), String> {
        match operation {
            Operation::Compute(function, to, from) => {
                let value = |i: usize| self.value(index, from[i]);
                let result = match function {
                    Function::One(f) => f(value(0)),
                    Function::Two(f) => f(value(0), value(1)),
                    Function::Three(f) => f(value(0), value(1), value(2)),
                    Function::Four(f) => f(value(0), value(1), value(2), value(3)),
                };
                if let Some(to) = to {
                    self.threads[index].registers[*to] = result;
                }
            }
            Operation::Pack(to, from, bits) => {
                let part = |source: &Source| self.value(index, *source) & ((1 << bits) - 1);
                let packed =
                    from.iter().rev().fold(0, |packed, source| packed << bits | part(source));
                self.threads[index].registers[*to] = packed;
            }
            Operation::Unpack(to, from, bits) => {
                let value = self.value(index, *from);
                for (i, register) in to.iter().enumerate() {
                    if let Some(register) = register {
                        let part = value >> (i as u32 * bits) & ((1 << bits) - 1);
                        self.threads[index].registers[*register] = part;
                    }
                }
            }
            Operation::Load(access, to) => {
                let mut loaded = [0; 4];
                let bytes = self.bytes(index, access, to.len())?;
                for (value, bytes) in loaded.iter_mut().zip(bytes.chunks_exact(access.size)) {
                    *value = number(bytes, access.signed);
                }
                for (register, value) in to.iter().zip(loaded) {
                    self.threads[index].registers[*register] = value;
                }
            }
            Operation::Store(access, from) => {
                let values = Vec::from_iter(from.iter().map(|source| self.value(index, *source)));
                self.store(index, access, &values)?;
            }
            Operation::Branch(to) => self.threads[index].next = *to,
            Operation::Return => self.threads[index].state = State::Ended,
            Operation::Nothing => {}
            Operation::Barrier => self.wait(index, Wait::Barrier),
            Operation::WarpBarrier(mask) => {
                let mask = self.value(index, *mask) as u32;
                self.wait(index, Wait::Warp(mask));
            }
            Operation::Shuffle(to, found, mode, sources) => {
                let sources = sources.map(|source| self.value(index, source));
                self.wait(index, Wait::Shuffle { to: *to, found: *found, mode: *mode, sources });
            }
            Operation::Multiply(wide, to, [a, b, c]) => {
                let values = [a, b, c].map(|sources| self.words(index, sources));
                let at = self.threads[index].next;
                self.wait(index, Wait::Multiply { wide: *wide, to: to.clone(), values, at });
            }
            Operation::Unknown(text) => return Err(format!("`{text}` is not known")),
        }
        Ok(())
    }

    fn wait(&mut self, index: usize, wait: Wait) {
        self.threads[index].state = State::Waits(wait);
    }

    fn address(&self, index: usize, access: &Access, count: usize) -> Result<(u64, usize), String> {
        let address = self.value(index, access.base).wrapping_add_signed(access.offset);
        // 32-bit addresses of shared memory wrap as 32 bits.
        let address = if access.space == Space::Shared { address & 0xffff_ffff } else { address };
        let size = access.size * count;
        match address % size as u64 {
            0 => Ok((address, size)),
            _ => Err(format!("{address:#x} is misaligned for {size} bytes")),
        }
    }

    fn bytes(&mut self, index: usize, access: &Access, count: usize) -> Result<&[u8], String> {
        let (address, size) = self.address(index, access, count)?;
        let thread = &self.threads[index];
        let range = address as usize..(address as usize).saturating_add(size);
        match access.space {
            Space::Global => self.memory.bytes(address, size).map(|bytes| &*bytes),
            Space::Shared => self.shared.read(address, size, thread.when),
            Space::Param => self.params.get(range).ok_or("a parameter that is not there".into()),
            Space::Local => thread.local.get(range).ok_or("beyond the thread's own memory".into()),
        }
    }

    fn store(&mut self, index: usize, access: &Access, values: &[u64]) -> Result<(), String> {
        let (address, size) = self.address(index, access, values.len())?;
        let thread = &mut self.threads[index];
        let range = address as usize..(address as usize).saturating_add(size);
        let bytes = match access.space {
            Space::Global => self.memory.bytes(address, size)?,
            Space::Shared => self.shared.write(address, size, thread.when)?,
            Space::Local => thread.local.get_mut(range).ok_or("beyond the thread's own memory")?,
            Space::Param => return Err("parameters cannot be written".into()),
        };
        for (bytes, value) in bytes.chunks_exact_mut(access.size).zip(values) {
            bytes.copy_from_slice(&value.to_le_bytes()[..access.size]);
        }
        Ok(())
    }

    /// Lets the block pass its barrier, if all threads that have not ended wait there.
    fn pass_barrier(&mut self) -> bool {
        let waits =
            |thread: &Thread| matches!(thread.state, State::Waits(Wait::Barrier) | State::Ended);
        if !self.threads.iter().all(waits) {
            return false;
        }
        for thread in &mut self.threads {
            thread.when.barriers += 1;
            if !matches!(thread.state, State::Ended) {
                thread.state = State::Runs;
            }
        }
        true
    }

    /// Carries out what lanes of a warp wait to do together; whether any did.
    fn meet(&mut self, first: usize) -> Result<bool, String> {
        let end = (first + WARP).min(self.threads.len());
        let lanes = &mut self.threads[first..end];
        let Some(mask) = lanes.iter().find_map(|thread| match &thread.state {
            State::Waits(Wait::Warp(mask)) => Some(*mask),
            State::Waits(Wait::Shuffle { sources, .. }) => Some(sources[3] as u32),
            State::Waits(Wait::Multiply { .. }) => Some(u32::MAX),
            _ => None,
        }) else {
            return Ok(false);
        };
        let members = Vec::from_iter((0..lanes.len()).filter(|lane| mask >> lane & 1 != 0));
        if members.iter().any(|&lane| matches!(lanes[lane].state, State::Ended)) {
            return Err(format!("lanes {mask:#x} were to meet, and one has ended"));
        }
        let states = Vec::from_iter(members.iter().map(|&lane| &lanes[lane].state));
        let all = |is: fn(&Wait) -> bool| {
            states.iter().all(|state| matches!(state, State::Waits(wait) if is(wait)))
        };
        if all(|wait| matches!(wait, Wait::Warp(_))) {
        } else if all(|wait| matches!(wait, Wait::Shuffle { .. })) {
            shuffle(lanes, mask)?;
        } else if all(|wait| matches!(wait, Wait::Multiply { .. })) {
            multiply(lanes)?;
        } else {
            return Ok(false);
        }
        for lane in lanes.iter_mut() {
            lane.when.warp += 1;
        }
        for lane in members {
            lanes[lane].state = State::Runs;
        }
        Ok(true)
    }
}

/// A number of up to eight bytes.
fn number(bytes: &[u8], signed: bool) -> u64 {
    let mut all = match (signed, bytes.last()) {
        (true, Some(128..)) => [0xff; 8],
        _ => [0; 8],
    };
    all[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(all)
}

fn shuffle(lanes: &mut [Thread], mask: u32) -> Result<(), String> {
    let sources = Vec::from_iter(lanes.iter().map(|thread| match &thread.state {
        State::Waits(Wait::Shuffle { sources, .. }) => Some(*sources),
        _ => None,
    }));
    for (lane, thread) in lanes.iter_mut().enumerate() {
        let State::Waits(Wait::Shuffle { to, found, mode, sources: own }) = &thread.state else {
            continue;
        };
        if own[3] as u32 != mask {
            return Err(format!("lanes of masks {mask:#x} and {:#x} meet", own[3]));
        }
        let partner = collective::partner(*mode, lane, own[1], own[2]);
        let from = partner.unwrap_or(lane);
        let value = sources.get(from).copied().flatten().filter(|_| mask >> from & 1 != 0);
        let Some([value, ..]) = value else {
            return Err(format!("lane {lane} shuffles with lane {from}, which is not there"));
        };
        thread.registers[*to] = value & 0xffff_ffff;
        if let Some(found) = found {
            thread.registers[*found] = partner.is_some().into();
        }
    }
    Ok(())
}

fn multiply(lanes: &mut [Thread]) -> Result<(), String> {
    let mut operands: [collective::Fragments; 3] = Default::default();
    let mut instruction = None;
    for (lane, thread) in lanes.iter().enumerate() {
        if let State::Waits(Wait::Multiply { wide, values, at, .. }) = &thread.state {
            if *instruction.get_or_insert((*wide, *at)) != (*wide, *at) {
                return Err("lanes meet at different matrix products".into());
            }
            for (operand, value) in operands.iter_mut().zip(values) {
                operand[lane].clone_from(value);
            }
        }
    }
    let Some((wide, _)) = instruction.filter(|_| lanes.len() == WARP) else {
        return Err("a matrix product without a whole warp".into());
    };
    let [a, b, c] = &operands;
    let results = collective::multiply(wide, a, b, c);
    for (thread, results) in lanes.iter_mut().zip(results) {
        if let State::Waits(Wait::Multiply { to, .. }) = &thread.state {
            for (register, value) in to.iter().zip(results) {
                thread.registers[*register] = value.into();
            }
        }
    }
    Ok(())
}
