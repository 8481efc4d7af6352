//! Tests of the host layer without a GPU, using a stand-in driver and a stand-in compiler.

#![allow(clippy::expect_used, reason = "tests")]

mod stand_in;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use safelora_fast_cuda::feature_distance::{Normalize, Pair, Results, Tokens};
use safelora_fast_cuda::{Cache, Cuda, CudaError, Dtype, Nvrtc, Source};
use stand_in::{Handle, StandIn, build};

const SOURCE: Source = Source::FeatureDistance;
const CONTEXT_0: &str = "0xc028";
const CONTEXT_1: &str = "0xc029";

fn pair(dtype: Dtype) -> Pair {
    Pair {
        dtype,
        hidden: 8,
        features: 0x1000,
        reference: 0x2000,
        features_strides: [64, 8],
        reference_strides: [64, 8],
    }
}

fn tokens() -> Tokens {
    Tokens { shape: [3, 8], mask: 0x3000, mask_strides: [8, 1], packing: None }
}

fn results() -> Results {
    Results { sums: 0x4000, factors: 0x5000, distances: 0x6000, sequences: 0x7000, share: 0x8000, distance: 0x9000 }
}

fn forward(cuda: &Cuda, device: i32, stream: usize, pairs: &[Pair]) -> Result<(), CudaError> {
    // SAFETY: the stand-in runs no kernel, so nothing is read or written.
    unsafe { cuda.feature_distance(device, stream, pairs, tokens(), Normalize::Sequence, results()) }
}

fn launches(driver: &Handle) -> Vec<String> {
    driver.record().into_iter().filter(|line| line.starts_with("cuLaunchKernel")).collect()
}

#[test]
fn a_missing_driver_says_what_was_looked_for() {
    let error = Cuda::open(&["libno-driver.so.1".into(), "/nowhere/libcuda.so".into()], Vec::new(), None).err();
    let Some(error @ CudaError::LibraryMissing { .. }) = error else { panic!("{error:?}") };
    let text = error.to_string();
    assert!(
        text.starts_with("the CUDA driver was not found: looked for libno-driver.so.1, /nowhere/libcuda.so; "),
        "{text}"
    );
    assert!(text.contains("the last said: /nowhere/libcuda.so: cannot open shared object file"), "{text}");
    assert_eq!(text.lines().count(), 1);
}

#[test]
fn the_first_library_that_loads_is_taken() {
    let stand_in = StandIn::new();
    let cuda = Cuda::open(&["libno-driver.so.1".into(), stand_in.driver.name()], Vec::new(), None).expect("a driver");
    assert_eq!(cuda.driver_version().expect("a version"), 13020);
    assert_eq!(stand_in.driver.record(), ["cuInit 0", "cuDriverGetVersion"]);
}

#[test]
fn an_old_driver_is_told_by_the_symbol_it_lacks() {
    let stand_in = StandIn::new();
    // The compiler is a library without the driver's functions.
    let error = Cuda::open(&[stand_in.nvrtc.name()], Vec::new(), None).err();
    let Some(CudaError::SymbolMissing { what: "the CUDA driver", symbol: "cuInit", library }) = error else {
        panic!("{error:?}")
    };
    assert_eq!(library, stand_in.nvrtc.name());
}

#[test]
fn a_failing_call_is_named_with_the_drivers_words() {
    let stand_in = StandIn::new();
    stand_in.driver.fail("cuInit", 100);
    let error = stand_in.open().err().expect("no driver without a device");
    assert_eq!(error.to_string(), "cuInit failed with CUDA_ERROR_NO_DEVICE (100): no CUDA-capable device is detected");
    stand_in.driver.fail("cuInit", 9999);
    let error = stand_in.open().err().expect("an error without words");
    assert_eq!(error.to_string(), "cuInit failed with an unknown error (9999): the driver has no words for it");
}

#[test]
fn every_call_on_the_way_to_a_launch_may_fail_and_leaves_no_context_behind() {
    let calls = [
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent",
        "cuThreadExchangeStreamCaptureMode",
        "cuLibraryLoadData",
        "cuLibraryGetKernel",
        "cuKernelGetFunction",
        "cuLaunchKernel",
    ];
    for name in calls {
        let stand_in = StandIn::new();
        let cuda = stand_in.open().expect("a driver");
        stand_in.driver.fail(name, 700);
        let error = forward(&cuda, 0, 0x77, &[pair(Dtype::F32)]).expect_err(name);
        let Some(call) = (match &error {
            CudaError::Driver { call, code: 700, .. } => Some(*call),
            _ => None,
        }) else {
            panic!("{error:?}")
        };
        assert_eq!(call, name);
        assert_eq!(stand_in.driver.number(b"stand_in_depth"), 0, "{name}");
        // After a failure, a retry works once the driver does.
        stand_in.driver.fail("", 0);
        forward(&cuda, 0, 0x77, &[pair(Dtype::F32)]).expect(name);
    }
}

#[test]
fn devices_that_are_not_there_or_too_old_are_refused() {
    let stand_in = StandIn::new();
    let cuda = stand_in.open().expect("a driver");
    assert_eq!(cuda.device_count().expect("a count"), 2);
    for index in [2, -1] {
        let error = cuda.capability(index).expect_err("no such device");
        assert!(matches!(error, CudaError::NoDevice { count: 2, .. }), "{error}");
    }
    stand_in.driver.devices(1, 7, 5);
    let error = cuda.capability(0).expect_err("an old device");
    assert!(error.to_string().starts_with("CUDA device 0 has compute capability 7.5; the kernels need 8.0"), "{error}");
    // The failure was not cached.
    stand_in.driver.devices(1, 8, 6);
    assert_eq!(cuda.capability(0).expect("a device"), (8, 6));
}

#[test]
fn a_launch_goes_to_the_callers_stream_in_the_primary_context_of_its_device() {
    let stand_in = StandIn::new();
    let cuda = stand_in.open().expect("a driver");
    forward(&cuda, 1, 0x77, &[pair(Dtype::Bf16), pair(Dtype::Bf16)]).expect("a launch");
    let tail = format!("shared 0 stream 0x77 context {CONTEXT_1}");
    let expected = [
        format!("cuLaunchKernel token_sums_bf16 grid 3 2 1 block 256 1 1 {tail}"),
        format!("cuLaunchKernel sequence_factors grid 3 2 1 block 128 1 1 {tail}"),
        format!("cuLaunchKernel total_distance grid 1 1 1 block 32 1 1 {tail}"),
    ];
    assert_eq!(launches(&stand_in.driver), expected);

    // After loading, a call only launches: no allocation, no copy, no waiting.
    stand_in.driver.forget();
    forward(&cuda, 1, 0x78, &[pair(Dtype::Bf16)]).expect("a launch");
    let calls: Vec<_> =
        stand_in.driver.record().iter().map(|line| line.split(' ').next().unwrap_or("").to_owned()).collect();
    let launch = "cuLaunchKernel";
    assert_eq!(calls, ["cuCtxPushCurrent", launch, launch, launch, "cuCtxPopCurrent"]);

    // Another device has its own context and its own copy of the kernels.
    stand_in.driver.forget();
    forward(&cuda, 0, 0, &[pair(Dtype::F32)]).expect("a launch");
    assert_eq!(stand_in.driver.record().iter().filter(|line| line.starts_with("cuLibraryLoadData")).count(), 1);
    assert!(launches(&stand_in.driver).iter().all(|line| line.ends_with(&format!("stream (nil) context {CONTEXT_0}"))));
    // It has the architecture of the first device, so its machine code came from the cache.
    assert_eq!(stand_in.nvrtc.number(b"stand_in_compilations"), 1);
}

#[test]
fn loading_is_allowed_while_a_stream_is_captured() {
    let stand_in = StandIn::new();
    let cuda = stand_in.open().expect("a driver");
    cuda.prepare(0, SOURCE).expect("kernels");
    let record = stand_in.driver.record();
    let modes = |line: &&String| line.starts_with("cuThreadExchange") || line.starts_with("cuLibraryLoadData");
    let modes: Vec<_> = record.iter().filter(modes).collect();
    assert_eq!(
        modes,
        [
            "cuThreadExchangeStreamCaptureMode 2",
            "cuLibraryLoadData CUBIN options 0 0 mode 2",
            "cuThreadExchangeStreamCaptureMode 0"
        ]
    );
    let kernels = record.iter().filter(|line| line.starts_with("cuLibraryGetKernel")).count();
    assert_eq!(kernels, SOURCE.kernels().len());
}

#[test]
fn layers_of_one_dtype_share_a_launch_up_to_what_its_parameters_hold() {
    let stand_in = StandIn::new();
    let cuda = stand_in.open().expect("a driver");
    let mut pairs = vec![pair(Dtype::F16); 50];
    pairs.push(pair(Dtype::F32));
    forward(&cuda, 0, 0, &pairs).expect("launches");
    let grids: Vec<_> =
        launches(&stand_in.driver).iter().map(|line| line.split(" block").next().unwrap_or("").to_owned()).collect();
    assert_eq!(
        grids,
        [
            "cuLaunchKernel token_sums_f16 grid 3 48 1",
            "cuLaunchKernel token_sums_f16 grid 3 2 1",
            "cuLaunchKernel token_sums_f32 grid 3 1 1",
            "cuLaunchKernel sequence_factors grid 3 51 1",
            "cuLaunchKernel total_distance grid 1 1 1"
        ]
    );
    stand_in.driver.forget();
    let chosen = [pairs[7], pairs[50]];
    // SAFETY: the stand-in runs no kernel.
    let written = unsafe { cuda.feature_distance_gradient(0, 0, &chosen, &[0xa000, 0xa800], [3, 8], 0x5000, 0xb000) };
    written.expect("launches");
    assert_eq!(launches(&stand_in.driver).len(), 2);
}

#[test]
fn an_empty_batch_launches_only_what_writes_the_zero() {
    let stand_in = StandIn::new();
    let cuda = stand_in.open().expect("a driver");
    let empty = Tokens { shape: [0, 8], ..tokens() };
    // SAFETY: the stand-in runs no kernel.
    unsafe { cuda.feature_distance(0, 0, &[pair(Dtype::F32)], empty, Normalize::None, results()) }.expect("a launch");
    assert_eq!(launches(&stand_in.driver).len(), 1);
}

#[test]
fn operands_beyond_what_a_kernel_counts_are_refused() {
    let stand_in = StandIn::new();
    let cuda = stand_in.open().expect("a driver");
    let huge = Pair { hidden: 1 << 31, ..pair(Dtype::F32) };
    let error = forward(&cuda, 0, 0, &[huge]).expect_err("too many elements");
    assert!(matches!(error, CudaError::Operands(_)), "{error}");
    let error = forward(&cuda, 0, 0, &vec![pair(Dtype::F32); 70_000]).expect_err("too many layers");
    assert!(error.to_string().contains("split the batch"), "{error}");
}

type Damage = fn(&mut Vec<u8>);

fn nvrtc(handle: &Handle) -> Nvrtc {
    Nvrtc::open(&[handle.name()]).expect("a compiler")
}

fn files(stand_in: &StandIn) -> Vec<PathBuf> {
    let mut files: Vec<_> =
        fs::read_dir(stand_in.cache()).expect("a cache").map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files
}

#[test]
fn the_cache_is_hit_until_something_differs_that_machine_code_depends_on() {
    let stand_in = StandIn::new();
    let cache = Cache::new(Some(stand_in.cache()));
    let compilations = || stand_in.nvrtc.number(b"stand_in_compilations");
    let first = cache.cubin(&nvrtc(&stand_in.nvrtc), SOURCE, "sm_90").expect("code");
    assert_eq!(first, b"CUBIN for sm_90\0");
    assert_eq!(cache.cubin(&nvrtc(&stand_in.nvrtc), SOURCE, "sm_90").expect("code"), first);
    assert_eq!(compilations(), 1);
    assert_eq!(cache.cubin(&nvrtc(&stand_in.nvrtc), SOURCE, "sm_100").expect("code"), b"CUBIN for sm_100\0");
    assert_eq!(compilations(), 2);
    stand_in.nvrtc.set(b"stand_in_version", 9);
    cache.cubin(&nvrtc(&stand_in.nvrtc), SOURCE, "sm_90").expect("code");
    assert_eq!((compilations(), files(&stand_in).len()), (3, 3));
}

#[test]
fn damaged_files_are_compiled_again_and_replaced() {
    let stand_in = StandIn::new();
    let cache = Cache::new(Some(stand_in.cache()));
    let whole = cache.cubin(&nvrtc(&stand_in.nvrtc), SOURCE, "sm_90").expect("code");
    let [path] = &files(&stand_in)[..] else { panic!("one file") };
    let bytes = fs::read(path).expect("the file");
    let damages: [Damage; 5] = [
        |bytes| bytes.truncate(bytes.len() - 1),
        |bytes| bytes.clear(),
        |bytes| *bytes.last_mut().expect("bytes") ^= 1,
        |bytes| bytes[9] ^= 1,
        |bytes| bytes[0] ^= 1,
    ];
    for (index, damage) in damages.into_iter().enumerate() {
        let mut damaged = bytes.clone();
        damage(&mut damaged);
        fs::write(path, damaged).expect("a damaged file");
        assert_eq!(cache.cubin(&nvrtc(&stand_in.nvrtc), SOURCE, "sm_90").expect("code"), whole);
        assert_eq!(stand_in.nvrtc.number(b"stand_in_compilations"), 2 + i32::try_from(index).expect("few"));
        assert_eq!(fs::read(path).expect("the file"), bytes);
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_done_without() {
    let stand_in = StandIn::new();
    fs::write(stand_in.cache(), "a file where the folder should be").expect("a file");
    let cache = Cache::new(Some(stand_in.cache()));
    for compilations in 1..3 {
        cache.cubin(&nvrtc(&stand_in.nvrtc), SOURCE, "sm_90").expect("code");
        assert_eq!(stand_in.nvrtc.number(b"stand_in_compilations"), compilations);
    }
}

#[test]
fn processes_that_compile_at_once_leave_one_whole_file() {
    const STAND_IN: &str = "SAFELORA_TEST_STAND_IN";
    if let Ok(paths) = std::env::var(STAND_IN) {
        let (library, folder) = paths.split_once('|').expect("two paths");
        for round in 0..20 {
            let cache = Cache::new(Some(PathBuf::from(folder).join(round.to_string())));
            let code = cache.cubin(&Nvrtc::open(&[library.to_owned()]).expect("a compiler"), SOURCE, "sm_90");
            assert_eq!(code.expect("code"), b"CUBIN for sm_90\0");
        }
        return;
    }
    let stand_in = StandIn::new();
    let children: Vec<_> = (0..4)
        .map(|_| {
            let mut command = Command::new(std::env::current_exe().expect("this test"));
            command.args(["--exact", "processes_that_compile_at_once_leave_one_whole_file"]);
            let paths = format!("{}|{}", stand_in.nvrtc.name(), stand_in.cache().display());
            command.env(STAND_IN, paths).spawn().expect("another process")
        })
        .collect();
    for mut child in children {
        assert!(child.wait().expect("its end").success());
    }
    for round in files(&stand_in) {
        let left: Vec<_> = fs::read_dir(round).expect("a cache").collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }
}

#[test]
fn what_the_compiler_says_is_one_line() {
    let stand_in = StandIn::new();
    let cuda = stand_in.open().expect("a driver");
    stand_in.nvrtc.set(b"stand_in_fail", 6);
    let error = cuda.prepare(0, SOURCE).expect_err("no code");
    assert_eq!(
        error.to_string(),
        "feature_distance.cu does not compile for sm_90 with NVRTC 13.2: kernel.cu(7): error: identifier \"x\" is undefined"
    );
    assert!(!stand_in.cache().exists());
}

#[test]
fn a_missing_compiler_is_found_out_when_a_kernel_is_needed() {
    let stand_in = StandIn::new();
    let cuda = Cuda::open(&[stand_in.driver.name()], vec!["libno-nvrtc.so.13".into()], None).expect("a driver");
    let error = cuda.prepare(0, SOURCE).expect_err("no compiler");
    assert!(error.to_string().starts_with("NVRTC was not found: looked for libno-nvrtc.so.13; "), "{error}");
}

#[test]
fn an_old_compiler_is_told_by_the_symbol_it_lacks() {
    let stand_in = StandIn::new();
    let source = stand_in.cache().with_extension("c");
    fs::write(&source, "int nvrtcVersion(int *a, int *b) { return *a = *b = 0; }").expect("a source");
    let library = source.with_extension("so");
    build(&source, &library);
    let error = Nvrtc::open(&[library.display().to_string()]).err();
    assert!(
        matches!(error, Some(CudaError::SymbolMissing { what: "NVRTC", symbol: "nvrtcCreateProgram", .. })),
        "{error:?}"
    );
}
