//! Programs whose results are known, and programs that are wrong: each must be told so.

use ptx_interpreter::{
    block::{Order, Size, launch},
    memory::Memory,
    ptx::parse,
};

/// Executes a kernel `k` of `threads` threads with the address of `out` as its parameter.
fn execute(body: &str, threads: u32, out: &mut [u32], order: Order) -> Result<(), String> {
    let source = format!(
        ".visible .entry k(.param .u64 k_param_0) {{ .shared .align 4 .b8 tile[256]; \
         ld.param.u64 %rd1, [k_param_0]; mov.u32 %t, %tid.x; mul.wide.u32 %rd2, %t, 4; \
         add.s64 %rd2, %rd1, %rd2; shl.b32 %r1, %t, 2; {body} ret; }}"
    );
    let kernels = parse(&source)?;
    let mut memory = Memory::new();
    let size = 4 * out.len();
    let address = memory.allocate(size);
    let bytes = Vec::from_iter(out.iter().flat_map(|x| x.to_le_bytes()));
    memory.bytes(address, size)?.copy_from_slice(&bytes);
    let launched = Size { grid: [1; 3], block: [threads, 1, 1], shared: 0 };
    launch(&kernels[0], launched, order, &address.to_le_bytes(), &mut memory)?;
    for (out, bytes) in out.iter_mut().zip(memory.bytes(address, size)?.chunks_exact(4)) {
        *out = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
    }
    Ok(())
}

fn results(body: &str, threads: usize) -> Result<Vec<u32>, String> {
    let run = |order| {
        let mut out = Vec::from_iter(0..threads as u32);
        execute(body, threads as u32, &mut out, order).map(|()| out)
    };
    let (ascending, descending) = (run(Order::Ascending)?, run(Order::Descending)?);
    assert_eq!(ascending, descending);
    Ok(ascending)
}

#[test]
fn threads_pass_values_on_through_shared_memory_and_shuffles() {
    let reverse = "st.shared.u32 [%r1+0], %t; bar.sync 0; sub.s32 %r2, 252, %r1; ld.shared.u32 %r3, [%r2]; \
                   st.global.u32 [%rd2], %r3;";
    assert_eq!(results(reverse, 64), Ok(Vec::from_iter((0..64).rev())));
    let sum = "mov.u32 %r2, %t; mov.u32 %r4, 16; $L: shfl.sync.bfly.b32 %r3|%p1, %r2, %r4, 31, -1; \
               add.s32 %r2, %r2, %r3; shr.u32 %r4, %r4, 1; setp.ne.s32 %p2, %r4, 0; @%p2 bra $L; \
               st.global.u32 [%rd2], %r2;";
    assert_eq!(results(sum, 32), Ok(vec![496; 32]));
}

#[test]
fn arithmetic_is_that_of_the_isa() {
    for (body, expected) in [
        (
            "mov.f32 %f1, 0f3F800001; fma.rn.f32 %f2, %f1, %f1, 0fBF800002; mov.b32 %r2, %f2;",
            0x2880_0000,
        ),
        ("cvt.rni.s32.f32 %r2, 0f40200000;", 2),
        ("cvt.rzi.s32.f32 %r2, 0fC0200000;", -2i32 as u32),
        ("prmt.b32 %r2, 0x80010203, 0x04050607, 0xB740;", 0xff04_0703),
        ("bfi.b32 %r2, 0xff, 0, 8, 4;", 0xf00),
        ("mov.u32 %r3, 0xff; cvt.s16.s8 %rs1, %r3; cvt.s32.s16 %r2, %rs1;", u32::MAX),
        ("dp4a.s32.s32 %r2, 0x01ff0280, 0x03030303, 1;", -377i32 as u32),
        ("max.f32 %f1, 0f7FC00000, 0f3F800000; mov.b32 %r2, %f1;", 0x3f80_0000),
        ("mov.b32 %r3, {1, 2}; mov.b32 {%rs1, %rs2}, %r3; cvt.u32.u16 %r2, %rs2;", 2),
        ("shr.s32 %r2, -8, 1;", -4i32 as u32),
        ("shl.b32 %r2, 1, 32;", 0),
        ("mad.lo.s32 %r2, -3, 5, 1;", -14i32 as u32),
        ("setp.lt.f32 %p1, 0f7FC00000, 0f3F800000; selp.b32 %r2, 1, 2, %p1;", 2),
    ] {
        let body = format!("{body} st.global.u32 [%rd2], %r2;");
        assert_eq!(results(&body, 1), Ok(vec![expected]), "{body}");
    }
}

#[test]
fn what_is_undefined_is_an_error() {
    for (body, threads, message) in [
        ("st.global.u32 [%rd2+4], %t;", 2, "4 bytes at offset 8 of an allocation of 8"),
        ("st.global.u32 [%rd2+-4], %t;", 1, "before all device memory"),
        ("st.global.u32 [%rd2+1], %t;", 1, "misaligned"),
        ("st.shared.u32 [%r1+252], %t;", 2, "of shared memory, which has 256"),
        ("ld.shared.u32 %r2, [%r1];", 1, "never written"),
        ("st.shared.u32 [0], %t;", 2, "a race"),
        ("st.shared.u32 [%r1], %t; ld.shared.u32 %r2, [0];", 2, "a race"),
        ("setp.eq.s32 %p1, %t, 0; @%p1 shfl.sync.idx.b32 %r2, %t, 0, 31, 3;", 2, "one has ended"),
        (
            "setp.eq.s32 %p1, %t, 0; @%p1 shfl.sync.idx.b32 %r2, %t, 0, 31, 3; bar.sync 0;",
            2,
            "never come",
        ),
        ("shfl.sync.idx.b32 %r2, %t, 1, 31, 1;", 1, "which is not there"),
        ("frobnicate.u32 %r2, %t;", 1, "is not known"),
    ] {
        let error = results(body, threads).expect_err(body);
        assert!(error.contains(message), "{body}: {error}");
    }
}
