use std::fs;

use proptest::prelude::*;
use safetensors::{SafeTensors, tensor::TensorView};

use super::*;

const NAME: &str = "built in";

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()
}

fn serialize(tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap())
    });
    let format = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize(views, Some(format)).unwrap()
}

fn sample() -> Vec<u8> {
    serialize(&[
        ("codes", Dtype::U8, &[2, 3], vec![0, 1, 2, 3, 4, 5]),
        ("weight", Dtype::BF16, &[2, 2], bf16_bytes(&[1., -2., 3.5, 1e-30])),
        ("scale", Dtype::BF16, &[1], bf16_bytes(&[1.5])),
        ("step", Dtype::I64, &[], 7i64.to_le_bytes().to_vec()),
        ("flags", Dtype::BOOL, &[1], vec![1]),
        ("empty", Dtype::F32, &[0, 4], vec![]),
    ])
}

fn open(bytes: Vec<u8>) -> Result<Checkpoint> {
    Checkpoint::from_bytes(NAME, bytes)
}

#[test]
fn tensors_as_stored() {
    let checkpoint = open(sample()).unwrap();
    let names: Vec<_> = checkpoint.names().collect();
    assert_eq!(names, ["codes", "empty", "flags", "scale", "step", "weight"]);
    let info = checkpoint.get("weight").unwrap();
    let expected =
        TensorInfo { dtype: Dtype::BF16, shape: &[2, 2], file: Path::new(NAME), bytes: 8 };
    assert_eq!(info, expected);
    assert_eq!(checkpoint.get("absent"), None);

    let weight = checkpoint.read("weight").unwrap();
    assert_eq!((weight.dtype(), weight.dims()), (DType::BF16, &[2, 2][..]));
    let expected = [1., -2., 3.5, 1e-30].map(bf16::from_f32);
    assert_eq!(weight.flatten_all().unwrap().to_vec1::<bf16>().unwrap(), expected);
    assert_eq!(checkpoint.read("codes").unwrap().to_vec2::<u8>().unwrap(), [[0, 1, 2], [3, 4, 5]]);
    assert_eq!(checkpoint.read("step").unwrap().to_scalar::<i64>().unwrap(), 7);
    assert_eq!(checkpoint.read("empty").unwrap().dims(), [0, 4]);
    assert_eq!(checkpoint.read_bytes("scale").unwrap(), bf16_bytes(&[1.5]));
    for (name, message) in [("flags", "BOOL"), ("absent", "not in the checkpoint")] {
        let error = checkpoint.read(name).unwrap_err().to_string();
        assert!(error.contains(NAME) && error.contains(name) && error.contains(message), "{error}");
    }
}

#[test]
fn scales() {
    let scale = |dtype, shape: &[usize], data| {
        open(serialize(&[("s", dtype, shape, data)])).unwrap().read_scale("s")
    };
    assert_eq!(scale(Dtype::BF16, &[1], bf16_bytes(&[1.5])).unwrap(), 1.5);
    assert_eq!(scale(Dtype::F16, &[], f16::from_f32(0.25).to_le_bytes().to_vec()).unwrap(), 0.25);
    assert_eq!(scale(Dtype::F32, &[1], 1e-40f32.to_le_bytes().to_vec()).unwrap(), 1e-40);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0., -0., -1.] {
        let error = scale(Dtype::F32, &[1], bad.to_le_bytes().to_vec()).unwrap_err().to_string();
        assert!(error.contains("tensor `s`") && error.contains(&bad.to_string()), "{error}");
    }
    assert!(scale(Dtype::F32, &[2], vec![0; 8]).unwrap_err().to_string().contains("F32 [2]"));
    assert!(scale(Dtype::I32, &[1], vec![1; 4]).unwrap_err().to_string().contains("I32"));
}

#[test]
fn builder_converts_floats_only() {
    let checkpoint = Arc::new(open(sample()).unwrap());
    let vb = checkpoint.var_builder(DType::F32, &Device::Cpu);
    let weight = vb.get((2, 2), "weight").unwrap();
    let expected = [1., -2., 3.5, bf16::from_f32(1e-30).to_f32()];
    assert_eq!(weight.flatten_all().unwrap().to_vec1::<f32>().unwrap(), expected);
    assert!(vb.contains_tensor("codes") && !vb.contains_tensor("absent"));
    let hint = Default::default();
    let codes = vb.get_with_hints_dtype((2, 3), "codes", hint, DType::U8).unwrap();
    assert_eq!(codes.dtype(), DType::U8);

    let wrong_shape = vb.get((2, 3), "weight").unwrap_err();
    let numbers = vb.get((2, 3), "codes").unwrap_err();
    let truncated = vb.get_with_hints_dtype((2, 2), "weight", hint, DType::U8).unwrap_err();
    let absent = vb.pp("layer").get(1, "absent").unwrap_err();
    for (error, message) in [
        (wrong_shape, "built in: tensor `weight`: expected shape [2, 3], found [2, 2]"),
        (numbers, "built in: tensor `codes`: holds U8, which cannot be read as F32"),
        (truncated, "built in: tensor `weight`: holds BF16, which cannot be read as U8"),
        (absent, "built in: tensor `layer.absent`: not in the checkpoint"),
    ] {
        assert_eq!(Error::from(error).to_string(), message);
    }
}

#[test]
fn shards() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(format!("{name}.safetensors")));
    let [a, b] = &paths;
    fs::write(a, serialize(&[("x", Dtype::U8, &[1], vec![1])])).unwrap();
    fs::write(b, serialize(&[("y", Dtype::U8, &[1], vec![2])])).unwrap();
    let checkpoint = Checkpoint::open(&paths).unwrap();
    assert_eq!(checkpoint.path(), folder.path());
    assert_eq!(checkpoint.get("y").unwrap().file, b);
    assert_eq!(checkpoint.read_bytes("x").unwrap(), [1]);
    assert_eq!(checkpoint.read_bytes("y").unwrap(), [2]);
    let absent = checkpoint.read("z").unwrap_err().to_string();
    assert!(absent.starts_with(&folder.path().display().to_string()), "{absent}");

    fs::copy(a, b).unwrap();
    let twice = Checkpoint::open(&paths).unwrap_err().to_string();
    assert!(twice.contains("b.safetensors: tensor `x`: also in"), "{twice}");
}

#[test]
fn large_tensors_arrive_in_pieces() {
    let bytes: Vec<u8> = (0..2 * READ_BYTES + 12).map(|i| (i / 3) as u8).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), serialize(&[("x", Dtype::U8, &[bytes.len()], bytes.clone())])).unwrap();
    let checkpoint = Checkpoint::open(&[file.path().to_owned()]).unwrap();
    assert!(checkpoint.read_bytes("x").unwrap() == bytes);
}

#[test]
fn writer_writes_what_the_crate_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let bytes = sample();
    let crate_view = SafeTensors::deserialize(&bytes).unwrap();
    let specs =
        crate_view.iter().map(|(name, view)| TensorSpec::new(name, view.dtype(), view.shape()));
    let mut writer = SafetensorsWriter::create(&path, specs.collect()).unwrap();
    for (name, view) in crate_view.iter() {
        match view.data().split_at_checked(2) {
            Some((head, tail)) if !tail.is_empty() => {
                writer.append(name, head).unwrap();
                writer.append(name, tail).unwrap();
            }
            _ => writer.write(name, view.data()).unwrap(),
        }
    }
    assert!(!path.exists());
    writer.finish().unwrap();
    assert!(fs::read(&path).unwrap() == bytes);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let ordinary = folder.path().join("ordinary");
        fs::write(&ordinary, "").unwrap();
        let mode = |path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&path), mode(&ordinary));
    }
}

#[test]
fn writer_refuses_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let spec = |name, shape: &[usize]| TensorSpec::new(name, Dtype::F32, shape);
    let create = || SafetensorsWriter::create(&path, vec![spec("x", &[2]), spec("y", &[1])]);

    let mut writer = create().unwrap();
    let tensor = Tensor::new(&[1f32, 2.], &Device::Cpu).unwrap();
    writer.write_tensor("x", &tensor).unwrap();
    let twice = writer.write_tensor("x", &tensor).unwrap_err();
    let unknown = writer.write("z", &[]).unwrap_err();
    let short = writer.write("y", &[0; 3]).unwrap_err();
    let shape = writer.write_tensor("y", &tensor).unwrap_err();
    writer.append("y", &[0; 3]).unwrap();
    let long = writer.append("y", &[0; 3]).unwrap_err();
    let missing = writer.finish().unwrap_err();
    let declared =
        SafetensorsWriter::create(&path, vec![spec("x", &[]), spec("x", &[])]).unwrap_err();
    let overflow = SafetensorsWriter::create(&path, vec![spec("x", &[usize::MAX, 2])]).unwrap_err();
    for (error, message) in [
        (twice, "tensor `x`: not declared, or already written"),
        (unknown, "tensor `z`: not declared"),
        (short, "tensor `y`: F32 of shape [1] takes 4 bytes, got 3"),
        (shape, "tensor `y`: declared F32 [1], got F32 [2]"),
        (long, "tensor `y`: 2 bytes more than declared"),
        (missing, "tensor `y`: declared but never written"),
        (declared, "tensor `x`: declared twice"),
        (overflow, "too large"),
    ] {
        let error = error.to_string();
        assert!(error.contains("model.safetensors") && error.contains(message), "{error}");
    }
    drop(create().unwrap());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    assert!(write_atomic(&folder.path().join("none/file"), b"").is_err());
}

#[test]
fn atomic_replacement() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    for text in ["old", "new and longer"] {
        write_atomic(&path, text.as_bytes()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// Whatever opens is consistent: the crate agrees, and reading anything gives a value or an error.
fn exercise(bytes: Vec<u8>) {
    let bytes: &'static [u8] = bytes.leak();
    let Ok(checkpoint) = Checkpoint::from_bytes(NAME, bytes) else { return };
    let reference = SafeTensors::deserialize(bytes).expect("opened, but the crate refuses it");
    assert_eq!(checkpoint.names().len(), reference.len());
    for name in checkpoint.names() {
        let (info, view) = (checkpoint.get(name).unwrap(), reference.tensor(name).unwrap());
        assert_eq!((info.dtype, info.shape), (view.dtype(), view.shape()));
        assert_eq!(checkpoint.read_bytes(name).unwrap(), view.data());
        let _ = checkpoint.read(name);
        let _ = checkpoint.read_scale(name);
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        exercise(bytes);
    }

    #[test]
    fn damaged_files_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        digits in prop::collection::vec((any::<prop::sample::Index>(), b'0'..=b'9'), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = sample();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        // Digits for digits keep the JSON valid and spoil shapes and offsets.
        for (at, digit) in digits {
            let found: Vec<_> = (8..bytes.len()).filter(|&i| bytes[i].is_ascii_digit()).collect();
            bytes[found[at.index(found.len())]] = digit;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        exercise(bytes);
    }
}
