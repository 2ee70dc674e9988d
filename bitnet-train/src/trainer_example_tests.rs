//! The loop over examples instead of a stream of text.

use super::*;

/// Questions and answers instead of the corpus, in the vocabulary of a run over it.
fn recipe(dir: &Path, packing: bool) -> Recipe {
    let mut recipe = super::recipe(dir);
    Dataset::open(&recipe).unwrap().vocabulary.save(dir).unwrap();
    let records: String = (0..40)
        .map(|i| {
            let cats = "the cats ".repeat(1 + i * 7 % 5);
            format!("{{\"prompt\": \"{i} hens?\", \"completion\": \"{cats}\"}}\n")
        })
        .collect();
    fs::write(dir.join("answers.jsonl"), records).unwrap();
    let data = &mut recipe.data;
    data.train[0].path = dir.join("answers.jsonl");
    data.validation.clear();
    (data.validation_split, data.validation_bytes) = (Some(0.2), None);
    (data.format, data.packing) = (Some(crate::sft::Format::Auto), Some(packing));
    data.tokenizer = Some(dir.join("tokenizer.json"));
    (recipe.model.max_position_embeddings, data.sequence_length) = (64, 64);
    recipe.validate().unwrap();
    recipe
}

#[test]
fn it_learns_to_answer_and_resumes() {
    for packing in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (recipe, model) = (recipe(dir.path(), packing), Bigram::new());
        let mut whole = start(&recipe, &model);
        assert_eq!(run(&mut whole, &model).unwrap(), Outcome::Finished);
        let records = untimed_metrics(&recipe);
        let evaluations: Vec<&EvaluationRecord> = records
            .iter()
            .filter_map(|r| if let Record::Evaluation(r) = r { Some(r) } else { None })
            .collect();
        let (first, last) = (evaluations[0], evaluations[evaluations.len() - 1]);
        assert!(last.nats_per_token < 0.8 * first.nats_per_token, "{first:?} {last:?}");
        let accuracy = last.token_accuracy.unwrap();
        assert!(accuracy > first.token_accuracy.unwrap() && accuracy <= 1., "{first:?} {last:?}");

        let dir = tempfile::tempdir().unwrap();
        let recipe = self::recipe(dir.path(), packing);
        let victim = Bigram::new().in_trouble(13, Trouble::Killed);
        run(&mut start(&recipe, &victim), &victim).unwrap_err();
        let resumed = Bigram::new();
        let mut trainer = resume(&recipe, &resumed).unwrap();
        run(&mut trainer, &resumed).unwrap();
        assert_eq!(resumed.weights(), model.weights());
        assert_eq!(trainer.state(), whole.state());
        assert_eq!(untimed_metrics(&recipe), records);
        // Other answers are another dataset.
        let path = dir.path().join("answers.jsonl");
        fs::write(&path, fs::read_to_string(&path).unwrap().replace("cats", "hens")).unwrap();
        let message = resume(&recipe, &resumed).unwrap_err().to_string();
        assert!(message.contains("another dataset"), "{message}");
    }
}

#[test]
fn ranks_share_a_last_batch_that_is_not_full() {
    let shared = |ranks: usize| {
        let dir = tempfile::tempdir().unwrap();
        let mut recipe = recipe(dir.path(), false);
        recipe.train.batch_size = 6 / ranks; // 32 examples are five batches of six, and two more
        recipe.train.steps = Some(12);
        ranks::run_ranks(&recipe, ranks, None)
    };
    let (one, three) = (shared(1), shared(3));
    for (weights, outcome) in &three {
        assert_eq!(*outcome, Outcome::Finished);
        assert_eq!(*weights, three[0].0);
        for (a, b) in weights.iter().flatten().zip(one[0].0.iter().flatten()) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
    }
}
