//! What it takes of cuBLAS and cuRAND to make a device: handles that nothing is done with. Other functions end the process.

#![allow(non_snake_case, unsafe_code)] // theirs

use std::ffi::{c_int, c_uint, c_void};

/// Defines functions that give a handle, or take one and succeed.
macro_rules! handles {
    (give: $($give:ident($($before:ident: $type:ty),*))*; take: $($take:ident($($arg:ident: $arg_type:ty),*))*;) => {
        $(
            /// A handle.
            ///
            /// # Safety
            /// `handle` can be written.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $give(handle: *mut *mut c_void $(, $before: $type)*) -> c_uint {
                // SAFETY: the caller's promise.
                unsafe { *handle = std::ptr::without_provenance_mut(1) };
                0
            }
        )*
        $(
            /// Done.
            #[unsafe(no_mangle)]
            pub extern "C" fn $take($($arg: $arg_type),*) -> c_uint {
                0
            }
        )*
    };
}
handles! {
    give:
        cublasCreate_v2()
        curandCreateGenerator(_kind: c_int);
    take:
        cublasDestroy_v2(_handle: *mut c_void)
        cublasSetStream_v2(_handle: *mut c_void, _stream: *mut c_void)
        curandDestroyGenerator(_generator: *mut c_void)
        curandSetStream(_generator: *mut c_void, _stream: *mut c_void)
        curandSetPseudoRandomGeneratorSeed(_generator: *mut c_void, _seed: u64)
        curandSetGeneratorOffset(_generator: *mut c_void, _offset: u64);
}
