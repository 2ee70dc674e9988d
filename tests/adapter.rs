//! LoRA adapters against PEFT: what it saved gives its logits and its gradients, beside a packed base and beside masters; and
//! sequences with adapters of their own in one batch, bit for bit what they are alone.

#![allow(clippy::unwrap_used)] // test code

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use bitnet_model::{
    adapter::{Adaptation, Adapter, AdapterConfig, MergedMatrix, Modules, Pair, WEIGHTS, merge},
    checkpoint::Checkpoint,
    config::WeightForm,
    kernels::TileFormat,
    kv_cache::KvCache,
    model::Model,
    nn::BitLinears,
    ops::KvType,
    weights::TernaryWeight,
};
use bitnet_tests::{
    fixture::{Fixture, flat, max_diff, relative_rms, root},
    oracle,
};
use bitnet_train::loss::{IGNORED, cross_entropy};
use candle_core::{D, DType, Device, IndexOp, Tensor, Var};

const OFFLINE: &str = "lora_bitnet_offline";
/// Masters; only the full set of fixtures has them (`BITNET_FIXTURES`).
const ONLINE: &str = "lora_bitnet_online";

fn masters() -> Option<Fixture> {
    root().join(ONLINE).is_dir().then(|| Fixture::open(ONLINE))
}

/// [`OFFLINE`]'s masters in place of its codes, without values of the reference.
fn latent() -> Fixture {
    let mut fixture = Fixture::open(OFFLINE);
    let weights = fixture.dir.join("source/latent.safetensors");
    fixture.checkpoint = Arc::new(Checkpoint::open(&[weights]).unwrap());
    fixture.config.quantization.as_mut().unwrap().weights = WeightForm::Latent;
    fixture
}

fn fixtures() -> impl Iterator<Item = Fixture> {
    [Fixture::open(OFFLINE)].into_iter().chain(masters())
}

fn adapter(fixture: &Fixture) -> Adapter {
    Adapter::open(&fixture.dir.join("adapter")).unwrap()
}

fn adaptation(fixture: &Fixture, adapters: &[(&Adapter, f64)]) -> Adaptation {
    Adaptation::new(&fixture.config, adapters).unwrap()
}

fn logits(model: &Model, tokens: &Tensor) -> Tensor {
    model.logits(&model.hidden_states(tokens, None).unwrap()).unwrap()
}

/// Asserts that rows which are no padding are those of the reference: to rounding, if not behind an activation whose code
/// flipped. In [`ONLINE`] the very first token, which all others see, has one exactly on a tie, so all are behind it.
fn assert_logits(fixture: &Fixture, name: &str, ours: &Tensor) {
    let expected = &fixture.expected[name];
    let mask = fixture.rows("attention_mask");
    let (mut exact, mut all) = (0, 0);
    for (row, mask) in mask.iter().enumerate() {
        for (token, _) in mask.iter().enumerate().filter(|(_, on)| **on == 1) {
            let at = |tensor: &Tensor| flat(&tensor.i((row, token)).unwrap());
            let (ours, expected) = (at(ours), at(expected));
            exact += usize::from(max_diff(&ours, &expected) < 1e-5);
            all += 1;
            let rms = relative_rms(&ours, &expected);
            assert!(rms < 0.03, "{}: {name}: row {row}, token {token}: {rms}", fixture.name);
        }
    }
    let is_exact = fixture.name == ONLINE || exact == all;
    assert!(is_exact, "{}: {name}: {exact} of {all} rows are exact", fixture.name);
}

#[test]
fn the_first_code_of_the_masters_fixture_lies_on_a_tie() {
    let Some(fixture) = masters() else { return };
    let oracle = oracle::run(&fixture, &[1]);
    assert_eq!(oracle.codes["model.layers.0.self_attn.q_proj"].tie_distance[0], 0.);
    let first = fixture.rows("input_ids").into_iter().map(|row| row[0]);
    assert!(first.eq([1, 1]));
}

#[test]
fn logits_are_those_of_peft() {
    for fixture in fixtures() {
        let (base, tokens) = (fixture.model(), fixture.tokens("input_ids"));
        let before = flat(&logits(&base, &tokens));
        assert_logits(&fixture, "logits_base", &logits(&base, &tokens));
        let adapter = adapter(&fixture);
        let adapted = base.adapted(&adaptation(&fixture, &[(&adapter, 1.)])).unwrap();
        assert_logits(&fixture, "logits_adapter", &logits(&adapted, &tokens));
        // Half of it twice is the whole; all of it and its opposite is nothing.
        let halves = adaptation(&fixture, &[(&adapter, 0.5), (&adapter, 0.5)]);
        assert_logits(
            &fixture,
            "logits_adapter",
            &logits(&base.adapted(&halves).unwrap(), &tokens),
        );
        let nothing = adaptation(&fixture, &[(&adapter, 1.), (&adapter, -1.)]);
        assert_logits(&fixture, "logits_base", &logits(&base.adapted(&nothing).unwrap(), &tokens));
        // The base is what it was.
        assert_eq!(flat(&logits(&base, &tokens)), before);
    }
}

#[test]
fn gradients_are_those_of_peft() {
    let fixture = Fixture::open(OFFLINE);
    let mut adapter = adapter(&fixture);
    let mut vars = Vec::new();
    for (path, pair) in &mut adapter.pairs {
        for (which, tensor) in [("lora_A", &mut pair.lora_a), ("lora_B", &mut pair.lora_b)] {
            let var = Var::from_tensor(tensor).unwrap();
            *tensor = var.as_tensor().clone();
            vars.push((format!("grad.base_model.model.{path}.{which}.weight"), var));
        }
    }
    assert_eq!(vars.len(), 28);
    let model = fixture.model().adapted(&adaptation(&fixture, &[(&adapter, 1.)])).unwrap();
    let labels = fixture.rows("labels").into_iter();
    let labels: Vec<i64> =
        labels.flat_map(|row| row.into_iter().skip(1).chain([IGNORED])).collect();
    let logits = logits(&model, &fixture.tokens("input_ids")).flatten_to(D::Minus2).unwrap();
    let loss = cross_entropy(&logits, &labels, None).unwrap();
    let expected = fixture.scalars["loss_adapter"].as_f64().unwrap();
    let off = f64::from(loss.to_scalar::<f32>().unwrap()) - expected;
    assert!(off.abs() < 3e-6, "the loss is off by {off:e}");
    let grads = loss.backward().unwrap();
    for (name, var) in &vars {
        let ours = flat(grads.get(var).unwrap_or_else(|| panic!("no gradient: {name}")));
        let expected = fixture.floats(name);
        let largest = expected.iter().fold(0f32, |most, g| most.max(g.abs()));
        let off = max_diff(&ours, &expected);
        assert!(largest > 0. && off < 1e-4 * largest, "{name}: {off:e} of {largest:e}");
    }
}

/// An adapter of two projections with other settings, and one of all of them.
fn two_adapters(fixture: &Fixture) -> [Arc<Adaptation>; 2] {
    let whole = adapter(fixture);
    let names = ["k_proj", "down_proj"];
    let config = AdapterConfig {
        rank: 8,
        alpha: -40.,
        use_rslora: true,
        target_modules: Modules::Names(names.map(String::from).into()),
        ..AdapterConfig::default()
    };
    let pairs =
        whole.pairs.iter().filter(|(path, _)| names.iter().any(|name| path.ends_with(name)));
    let pairs: BTreeMap<String, Pair> =
        pairs.map(|(path, pair)| (path.clone(), pair.clone())).collect();
    assert_eq!(pairs.len(), 4);
    let part = Adapter::new(config, pairs, BTreeMap::new());
    [
        Arc::new(adaptation(fixture, &[(&whole, 1.), (&part, 0.3)])),
        Arc::new(adaptation(fixture, &[(&part, 1.)])),
    ]
}

/// The logits of the last token, after a prompt and three more tokens one by one.
fn continued(model: &Model, mut cache: KvCache, prompts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let batch = prompts.len();
    let tensor = |ids: Vec<u32>| {
        let seq = ids.len() / batch;
        Tensor::from_vec(ids, (batch, seq), &Device::Cpu).unwrap()
    };
    let mut last = model.forward(&tensor(prompts.concat()), &mut cache).unwrap();
    for step in 0..3 {
        last = model.forward(&tensor(vec![5 + step; batch]), &mut cache).unwrap();
    }
    last.to_vec2().unwrap()
}

#[test]
fn rows_with_adapters_of_their_own_are_what_they_are_alone() {
    for fixture in fixtures() {
        let (name, model) = (&fixture.name, fixture.model());
        let [first, second] = two_adapters(&fixture);
        let rows = [None, Some(&first), Some(&second), None, Some(&first)];
        let lengths = [9, 4, 12, 12, 7];
        let prompts: Vec<Vec<u32>> =
            lengths.iter().map(|&len| (0..len).map(|i| i * 31 % 200 + len).collect()).collect();
        let longest = 12;
        let padded: Vec<Vec<u32>> = prompts
            .iter()
            .map(|row| [vec![0; longest - row.len()], row.clone()].concat())
            .collect();
        let mut cache = model
            .padded_cache(KvType::F32, prompts.iter().map(|row| longest - row.len()).collect());
        for (row, adapter) in rows.iter().enumerate() {
            cache.adapt(row, adapter.cloned()).unwrap();
        }
        let together = continued(&model, cache, &padded);
        for (row, adapter) in rows.iter().enumerate() {
            let alone = |model: &Model, adapter: Option<&Arc<Adaptation>>| {
                let mut cache = model.cache(KvType::F32, 1);
                cache.adapt(0, adapter.cloned()).unwrap();
                continued(model, cache, &prompts[row..=row]).remove(0)
            };
            assert_eq!(alone(&model, *adapter), together[row], "{name}: row {row}");
            // Beside the whole model it is the same.
            if let Some(adapter) = adapter {
                let adapted = model.adapted(adapter).unwrap();
                assert_eq!(alone(&adapted, None), together[row], "{name}: row {row}");
                assert_ne!(alone(&model, None), together[row], "{name}: row {row}");
            }
        }
    }
}

#[test]
fn a_row_keeps_its_adapter() {
    let fixture = Fixture::open(OFFLINE);
    let model = fixture.model();
    let [first, _] = two_adapters(&fixture);
    let mut cache = model.cache(KvType::F32, 2);
    let refusal = |cache: &mut KvCache, row, adapter: &Arc<Adaptation>| {
        cache.adapt(row, Some(adapter.clone())).unwrap_err().to_string()
    };
    assert!(refusal(&mut cache, 2, &first).contains("no row 2 in a batch of 2"));
    let shallow = Arc::new(Adaptation::default());
    assert!(refusal(&mut cache, 0, &shallow).contains("for 0 layers"));
    assert!(model.adapted(&shallow).err().unwrap().to_string().contains("for 0 layers"));
    let mut whole = adapter(&fixture);
    whole
        .modules
        .insert("model.norm.weight".into(), Tensor::ones(64, DType::F32, &Device::Cpu).unwrap());
    let whole = Arc::new(adaptation(&fixture, &[(&whole, 1.)]));
    assert!(refusal(&mut cache, 0, &whole).contains("replaces `model.norm.weight`"));
    let tokens = Tensor::ones((2, 3), DType::U32, &Device::Cpu).unwrap();
    model.forward(&tokens, &mut cache).unwrap();
    assert!(refusal(&mut cache, 0, &first).contains("row 0 holds tokens"));
}

#[test]
fn modules_stored_whole_take_the_place_of_the_models() {
    let fixture = Fixture::open(OFFLINE);
    let mut adapter = adapter(&fixture);
    let rows = fixture.checkpoint.read("model.embed_tokens.weight").unwrap();
    let head = (rows.to_dtype(DType::F32).unwrap() * 2.).unwrap();
    let norm = Tensor::full(0.5f32, 64, &Device::Cpu).unwrap();
    adapter.config.modules_to_save = vec!["lm_head".into(), "input_layernorm".into()];
    adapter.modules.insert("lm_head.weight".into(), head);
    for layer in 0..2 {
        let name = format!("model.layers.{layer}.input_layernorm.weight");
        adapter.modules.insert(name, norm.clone());
    }
    // Through the files: names and tensors come back.
    let dir = tempfile::tempdir().unwrap();
    adapter.save(dir.path()).unwrap();
    let saved = Adapter::open(dir.path()).unwrap();
    assert_eq!(saved.modules.len(), 3);
    let (base, tokens) = (fixture.model(), fixture.tokens("input_ids"));
    let model = base.adapted(&adaptation(&fixture, &[(&saved, 1.)])).unwrap();
    let norms_only = {
        let mut adapter = saved.clone();
        adapter.modules.remove("lm_head.weight");
        adapter.config.modules_to_save = vec!["input_layernorm".into()];
        base.adapted(&adaptation(&fixture, &[(&adapter, 1.)])).unwrap()
    };
    // Twice the head's rows are twice the logits, exactly; the tied embedding is not touched.
    let doubled = (logits(&norms_only, &tokens) * 2.).unwrap();
    assert_eq!(flat(&logits(&model, &tokens)), flat(&doubled));
    assert_ne!(flat(&logits(&norms_only, &tokens)), flat(&logits(&base, &tokens)));
    let refusal = |adapters: &[(&Adapter, f64)]| {
        Adaptation::new(&fixture.config, adapters).unwrap_err().to_string()
    };
    assert!(refusal(&[(&saved, 0.5)]).contains("a scale of 0.5 cannot be applied"));
    assert!(refusal(&[(&saved, 1.), (&saved, 1.)]).contains("already replaced"));
    assert!(refusal(&[(&saved, f64::NAN)]).contains("NaN is no number"));
}

#[test]
fn what_is_saved_is_what_was_read() {
    let fixture = Fixture::open(OFFLINE);
    let (original, dir) = (fixture.dir.join("adapter"), tempfile::tempdir().unwrap());
    let copy = dir.path().join("new/adapter");
    let adapter = Adapter::open(&original).unwrap();
    adapter.save(&copy).unwrap();
    adapter.save(&copy).unwrap(); // over an earlier one
    assert_eq!(Adapter::open(&copy).unwrap().config, adapter.config);
    let open = |dir: &Path| Checkpoint::open(&[dir.join(WEIGHTS)]).unwrap();
    let (before, after) = (open(&original), open(&copy));
    assert!(before.names().eq(after.names()));
    for name in before.names() {
        assert_eq!(before.read_bytes(name).unwrap(), after.read_bytes(name).unwrap(), "{name}");
    }
    let files = fs::read_dir(&copy).unwrap().map(|file| file.unwrap().file_name());
    assert_eq!(files.count(), 2, "something was left behind");
    // Half precision, as some adapters are stored.
    let mut tensors = candle_core::safetensors::load(original.join(WEIGHTS), &Device::Cpu).unwrap();
    for tensor in tensors.values_mut() {
        *tensor = tensor.to_dtype(DType::BF16).unwrap();
    }
    candle_core::safetensors::save(&tensors, copy.join(WEIGHTS)).unwrap();
    let half = Adapter::open(&copy).unwrap();
    half.check(&fixture.config).unwrap();
    assert!(half.pairs.values().all(|pair| pair.lora_a.dtype() == DType::F32));
}

/// The base's codes stay packed: what an adapter takes are its own bytes.
#[test]
fn an_adapted_model_takes_the_adapters_bytes() {
    let fixture = Fixture::open(OFFLINE);
    let base = fixture.model_with(&BitLinears::new(fixture.config.quantization.unwrap()));
    let sum = adaptation(&fixture, &[(&adapter(&fixture), 1.)]);
    let adapted = base.adapted(&sum).unwrap();
    let bytes = adapter(&fixture).parameters() * size_of::<f32>();
    assert_eq!(sum.pair_bytes(), bytes);
    assert_eq!(adapted.projection_bytes().unwrap() - base.projection_bytes().unwrap(), bytes);
}

/// The checkpoint of `fixture` with the adapter merged into it, through a file in `dir`.
fn merged(
    fixture: &Fixture,
    checkpoint: &Checkpoint,
    sum: &Adaptation,
    dir: &Path,
) -> (Arc<Checkpoint>, Vec<MergedMatrix>) {
    let path = dir.join("model.safetensors");
    let matrices = merge(&fixture.config, checkpoint, sum, &path, |_, _| {}).unwrap();
    (Arc::new(Checkpoint::open(&[path]).unwrap()), matrices)
}

fn model_of(fixture: &Fixture, checkpoint: &Arc<Checkpoint>) -> Model {
    fixture.config.check_tensors(checkpoint).unwrap();
    let linears = BitLinears::new(fixture.config.quantization.unwrap());
    let vb = checkpoint.var_builder(DType::F32, &Device::Cpu);
    Model::load(&fixture.config, &linears, vb).unwrap()
}

#[test]
fn masters_merge_as_in_peft() {
    let (Some(fixture), dir) = (masters(), tempfile::tempdir().unwrap()) else { return };
    // The reference merged f32 masters.
    let names = Vec::from_iter(fixture.checkpoint.names().map(String::from));
    let widened = names.iter().map(|name| {
        (name.clone(), fixture.checkpoint.read(name).unwrap().to_dtype(DType::F32).unwrap())
    });
    let path = dir.path().join("f32.safetensors");
    candle_core::safetensors::save(&widened.collect(), &path).unwrap();
    let masters = Checkpoint::open(&[path]).unwrap();
    let sum = adaptation(&fixture, &[(&adapter(&fixture), 1.)]);
    let (checkpoint, matrices) = merged(&fixture, &masters, &sum, dir.path());
    for (name, expected) in
        fixture.expected.iter().filter_map(|(key, v)| Some((key.strip_prefix("merged.")?, v)))
    {
        let off = max_diff(&flat(&checkpoint.read(name).unwrap()), &flat(expected));
        assert!(off < 1e-7, "{name}: {off:e}");
    }
    // A sum in another order may put a weight on the other side of a threshold.
    let flipped = &fixture.scalars["fraction_of_codes_changed_by_merge"];
    assert_eq!(matrices.len(), 14);
    for matrix in &matrices {
        let flips = matrix.flipped.unwrap();
        let expected = flipped[&matrix.name].as_f64().unwrap() * matrix.weights as f64;
        assert!((flips as f64 - expected).abs() < 2., "{}: {flips}, {expected}", matrix.name);
    }
    let logits = logits(&model_of(&fixture, &checkpoint), &fixture.tokens("input_ids"));
    assert_logits(&fixture, "logits_merged", &logits);
}

/// The formula, and the flips counted code by code.
#[test]
fn masters_take_the_sum() {
    let (fixture, dir) = (latent(), tempfile::tempdir().unwrap());
    let adapter = adapter(&fixture);
    let sum = adaptation(&fixture, &[(&adapter, 2.)]);
    let (checkpoint, matrices) = merged(&fixture, &fixture.checkpoint, &sum, dir.path());
    assert_eq!(matrices.len(), 14);
    for matrix in &matrices {
        let path = matrix.name.strip_suffix(".weight").unwrap();
        let (pair, scale) =
            (&adapter.pairs[path], adapter.config.pair(path).unwrap().unwrap().scale);
        let read = |checkpoint: &Checkpoint| {
            checkpoint.read(&matrix.name).unwrap().to_dtype(DType::F32).unwrap()
        };
        let (before, after) = (read(&fixture.checkpoint), read(&checkpoint));
        let delta = (pair.lora_b.matmul(&pair.lora_a).unwrap() * (2. * scale)).unwrap();
        for (found, sum) in flat(&after).iter().zip(flat(&(&before + delta).unwrap())) {
            // Rounded to bfloat16, of a sum that is itself a few roundings of f32 off.
            assert!((found - sum).abs() <= sum.abs() * 2f32.powi(-8) + 1e-6, "{found}, {sum}");
        }
        let shape = before.dims2().unwrap();
        let codes = |latent: &Tensor| {
            TernaryWeight::from_latent(
                &flat(latent),
                shape,
                fixture.config.quantization.unwrap().rounding,
                TileFormat::TwoBit,
            )
        };
        let (old, new) = (codes(&before), codes(&after));
        let cells = (0..shape.0).flat_map(|row| (0..shape.1).map(move |col| (row, col)));
        let flips = cells.filter(|&(row, col)| old.code(row, col) != new.code(row, col)).count();
        assert_eq!(matrix.flipped, Some(flips), "{}", matrix.name);
    }
}

#[test]
fn what_is_merged_keeps_its_form() {
    for fixture in fixtures().chain([latent()]) {
        let (name, dir) = (&fixture.name, tempfile::tempdir().unwrap());
        let adapter = adapter(&fixture);
        let same = |a: &Checkpoint, b: &Checkpoint, name: &str| {
            assert_eq!(a.get(name).unwrap().dtype, b.get(name).unwrap().dtype, "{name}");
            a.read_bytes(name).unwrap() == b.read_bytes(name).unwrap()
        };
        // Nothing merged is the same file's contents.
        let nothing = adaptation(&fixture, &[]);
        let (checkpoint, matrices) = merged(&fixture, &fixture.checkpoint, &nothing, dir.path());
        assert!(matrices.is_empty());
        for tensor in fixture.checkpoint.names() {
            assert!(same(&fixture.checkpoint, &checkpoint, tensor), "{name}: {tensor}");
        }
        // A large multiple flips codes, and only projections change.
        let much = adaptation(&fixture, &[(&adapter, 8.)]);
        let (checkpoint, matrices) = merged(&fixture, &fixture.checkpoint, &much, dir.path());
        assert!(checkpoint.names().eq(fixture.checkpoint.names()));
        for tensor in fixture.checkpoint.names() {
            let is_weight = tensor.ends_with("_proj.weight");
            assert_eq!(same(&fixture.checkpoint, &checkpoint, tensor), !is_weight, "{tensor}");
        }
        assert!(matrices.iter().all(|matrix| matrix.flipped.unwrap() > matrix.weights / 20));
        let before = model_of(&fixture, &fixture.checkpoint);
        let after = model_of(&fixture, &checkpoint);
        let tokens = fixture.tokens("input_ids");
        assert_ne!(flat(&logits(&before, &tokens)), flat(&logits(&after, &tokens)));
    }
}

/// A packed base keeps its scales: the codes become those nearest to what they stood for and the adapter.
#[test]
fn a_packed_base_takes_the_nearest_codes() {
    let (fixture, dir) = (Fixture::open(OFFLINE), tempfile::tempdir().unwrap());
    let sum = adaptation(&fixture, &[(&adapter(&fixture), 4.)]);
    let (checkpoint, _) = merged(&fixture, &fixture.checkpoint, &sum, dir.path());
    let codes = |checkpoint: &Checkpoint, name: &str| -> Vec<i32> {
        let packed = checkpoint.read_bytes(name).unwrap();
        (0..4)
            .flat_map(|f| packed.iter().map(move |byte| i32::from(byte >> (2 * f) & 3) - 1))
            .collect()
    };
    let name = "model.layers.1.self_attn.k_proj.weight";
    let scale = checkpoint.read_scale(&format!("{name}_scale")).unwrap();
    let delta = flat(&sum.blocks()[1].pairs("k_proj")[0].weight_delta().unwrap());
    let (before, after) = (codes(&fixture.checkpoint, name), codes(&checkpoint, name));
    for ((before, after), delta) in before.iter().zip(after).zip(delta) {
        let nearest = (*before as f32 + delta / scale).clamp(-1., 1.);
        assert!((nearest - after as f32).abs() < 0.5 + 1e-5, "{before} + {delta}: {after}");
    }
}

#[test]
fn merges_that_are_impossible_are_refused() {
    let (fixture, dir) = (Fixture::open(OFFLINE), tempfile::tempdir().unwrap());
    let mut adapter = adapter(&fixture);
    let head = fixture.checkpoint.read("model.embed_tokens.weight").unwrap();
    adapter.modules.insert("lm_head.weight".into(), head.to_dtype(DType::F32).unwrap());
    let sum = adaptation(&fixture, &[(&adapter, 1.)]);
    let path = dir.path().join("model.safetensors");
    let refused = merge(&fixture.config, &fixture.checkpoint, &sum, &path, |_, _| {});
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("tied") && message.contains("lm_head.weight"), "{message}");
    assert!(!path.exists());
}
