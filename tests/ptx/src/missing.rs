//! Functions that Candle, `cudarc` and Candle's own library of kernels name, and that nothing here calls: a program that links
//! against NVIDIA's libraries needs them to be there.

#![allow(unsafe_code)] // names that C calls

/// Ends the process with the function's name: there is no result that would be right.
fn missing(name: &str) -> ! {
    eprintln!("libcuda stand-in: {name} is called, and is not there");
    std::process::abort()
}

macro_rules! missing {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        #[allow(non_snake_case)] // theirs
        extern "C" fn $name() -> u32 {
            missing(stringify!($name))
        }
    )*};
}

missing! {
    candle_launch_moe_align cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCacheConfig cuCtxGetLimit
    cuCtxGetStreamPriorityRange cuCtxSetCacheConfig cuCtxSetFlags cuCtxSetLimit
    cuDestroyExternalMemory cuDeviceGetDefaultMemPool cuDeviceGetMemPool cuDeviceGetUuid_v2
    cuDeviceSetMemPool cuEventElapsedTime_v2 cuExternalMemoryGetMappedBuffer cuFuncGetAttribute
    cuFuncSetAttribute cuFuncSetCacheConfig cuGraphDestroy cuGraphExecDestroy
    cuGraphInstantiateWithFlags cuGraphLaunch cuGraphUpload cuImportExternalMemory
    cuLaunchCooperativeKernel cuLaunchHostFunc cuMemAdvise_v2 cuMemAllocFromPoolAsync
    cuMemAllocManaged cuMemFreeHost cuMemHostAlloc cuMemPoolCreate cuMemPoolDestroy
    cuMemPoolGetAttribute cuMemPoolSetAttribute cuMemPoolTrimTo cuMemPrefetchAsync_v2
    cuMemcpyPeerAsync cuModuleGetGlobal_v2 cuModuleLoad cuOccupancyAvailableDynamicSMemPerBlock
    cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags cuOccupancyMaxActiveClusters
    cuOccupancyMaxPotentialBlockSize cuOccupancyMaxPotentialBlockSizeWithFlags
    cuOccupancyMaxPotentialClusterSize cuProfilerStart cuProfilerStop cuStreamAttachMemAsync
    cuStreamBeginCapture_v2 cuStreamEndCapture cublasDasum_v2 cublasDgemmStridedBatched
    cublasDgemm_v2 cublasDgemv_v2 cublasGemmEx cublasGemmStridedBatchedEx cublasLtCreate
    cublasLtDestroy cublasLtLoggerOpenFile cublasLtLoggerSetLevel cublasLtMatmul
    cublasLtMatmulAlgoGetHeuristic cublasLtMatmulDescCreate cublasLtMatmulDescDestroy
    cublasLtMatmulDescSetAttribute cublasLtMatmulPreferenceCreate cublasLtMatmulPreferenceDestroy
    cublasLtMatmulPreferenceSetAttribute cublasLtMatrixLayoutCreate cublasLtMatrixLayoutDestroy
    cublasLtMatrixLayoutSetAttribute cublasSasum_v2 cublasSgemmStridedBatched cublasSgemm_v2
    cublasSgemv_v2 curandGenerate curandGenerateLogNormal curandGenerateLogNormalDouble
    curandGenerateLongLong curandGenerateNormal curandGenerateNormalDouble curandGeneratePoisson
    curandGenerateUniform curandGenerateUniformDouble launch_mmq_gguf_q2_k launch_mmq_gguf_q3_k
    launch_mmq_gguf_q4_0 launch_mmq_gguf_q4_1 launch_mmq_gguf_q4_k launch_mmq_gguf_q5_0
    launch_mmq_gguf_q5_1 launch_mmq_gguf_q5_k launch_mmq_gguf_q6_k launch_mmq_gguf_q8_0
    launch_mmq_quantize_q8_1_ launch_mmvq_gguf_q2_k_bf16_plain launch_mmvq_gguf_q2_k_f16_plain
    launch_mmvq_gguf_q2_k_f32_plain launch_mmvq_gguf_q3_k_bf16_plain
    launch_mmvq_gguf_q3_k_f16_plain launch_mmvq_gguf_q3_k_f32_plain
    launch_mmvq_gguf_q4_0_bf16_plain launch_mmvq_gguf_q4_0_f16_plain
    launch_mmvq_gguf_q4_0_f32_plain launch_mmvq_gguf_q4_1_bf16_plain
    launch_mmvq_gguf_q4_1_f16_plain launch_mmvq_gguf_q4_1_f32_plain
    launch_mmvq_gguf_q4_k_bf16_plain launch_mmvq_gguf_q4_k_f16_plain
    launch_mmvq_gguf_q4_k_f32_plain launch_mmvq_gguf_q5_0_bf16_plain
    launch_mmvq_gguf_q5_0_f16_plain launch_mmvq_gguf_q5_0_f32_plain
    launch_mmvq_gguf_q5_1_bf16_plain launch_mmvq_gguf_q5_1_f16_plain
    launch_mmvq_gguf_q5_1_f32_plain launch_mmvq_gguf_q5_k_bf16_plain
    launch_mmvq_gguf_q5_k_f16_plain launch_mmvq_gguf_q5_k_f32_plain
    launch_mmvq_gguf_q6_k_bf16_plain launch_mmvq_gguf_q6_k_f16_plain
    launch_mmvq_gguf_q6_k_f32_plain launch_mmvq_gguf_q8_0_bf16_plain
    launch_mmvq_gguf_q8_0_f16_plain launch_mmvq_gguf_q8_0_f32_plain
    launch_mmvq_gguf_quantize_q8_1_bf16 launch_mmvq_gguf_quantize_q8_1_f16
    launch_mmvq_gguf_quantize_q8_1_f32 moe_gemm_gguf moe_gemm_gguf_prefill moe_gemm_wmma
    nvrtcCompileProgram nvrtcCreateProgram nvrtcDestroyProgram nvrtcGetPTX nvrtcGetPTXSize
    nvrtcGetProgramLog nvrtcGetProgramLogSize
}
