use super::*;

const DIVERGENCE: DivergenceLimits = DivergenceLimits { margin: 0.3, updates: 50 };
const COLLAPSE: CollapseLimits = CollapseLimits { evaluations: 3, after: 1000 };

/// Noise between −1 and 1 that looks random enough.
fn noise(step: usize) -> f64 {
    (step as f64 * 12.9898).sin() * (step as f64 * 78.233).cos()
}

/// The loss of an update.
type Losses = fn(usize) -> f64;

/// What the detector says about `losses`, and after which update.
fn diverges(losses: impl Fn(usize) -> f64, steps: usize) -> Option<(usize, Finding)> {
    let mut detector = Divergence::default();
    (1..=steps).find_map(|step| {
        let finding = detector.observe(step, losses(step), false, DIVERGENCE)?;
        Some((step, finding))
    })
}

/// From 7.6 to 2.2, with a plateau at 6 as ternary models have it.
fn s_shaped(step: usize) -> f64 {
    let x = step as f64;
    2.2 + 1.6 * (-x / 30.).exp() + 3.8 / (1. + ((x - 300.) / 60.).exp())
}

#[test]
fn sound_runs_go_on() {
    let sound: [Losses; 6] = [
        |step| s_shaped(step) + 0.5 * noise(step),
        // A spike of 40 updates, and single ones.
        |step| s_shaped(step) + if (600..640).contains(&step) { 4. } else { 0. },
        |step| s_shaped(step) + if step.is_multiple_of(9) { 20. } else { 0. },
        // One that begins again to fall from where the second stage's learning rate put it.
        |step| s_shaped(step) + if step > 1500 { 0.3 } else { 0. },
        |_| 7.6,
        // Text known by heart.
        |step| if step < 500 { 0.01 } else { 0.05 },
    ];
    for (i, losses) in sound.into_iter().enumerate() {
        assert_eq!(diverges(losses, 3000), None, "curve {i}");
    }
}

#[test]
fn divergence_is_found_where_it_began() {
    let bad: [(Losses, usize); 4] = [
        (|step| if step < 800 { s_shaped(step) } else { 6. + 0.3 * noise(step) }, 800),
        // From the first updates on.
        (|step| if step == 1 { 7.6 } else { 40. + 10. * noise(step) }, 2),
        // Slowly: 30 % above 2.2 is 2.86.
        (|step| s_shaped(step) + (step as f64 - 1000.).max(0.) * 1e-3, 1661),
        (|step| if step < 500 { s_shaped(step) } else { 1e6 }, 500),
    ];
    for (i, (losses, began)) in bad.into_iter().enumerate() {
        let (step, finding) = diverges(losses, 3000).unwrap();
        assert_eq!(step - finding.since, DIVERGENCE.updates, "curve {i}");
        assert!(finding.since.abs_diff(began) < 4, "curve {i}: {finding:?}");
        assert!(finding.reason.contains("for 50 updates"), "{}", finding.reason);
    }
}

#[test]
fn a_changing_objective_is_no_divergence() {
    let mut detector = Divergence::default();
    for step in 1..=2000 {
        let lambda = (step as f64 / 1000.).min(1.);
        let loss = 1. + 3. * lambda; // quantization comes into force
        assert_eq!(detector.observe(step, loss, lambda < 1., DIVERGENCE), None);
    }
    assert_eq!(detector.level, Some(4.));
}

#[test]
fn a_state_that_was_saved_finds_the_same() {
    let losses = |step: usize| if step < 90 { s_shaped(step) } else { 30. + noise(step) };
    let whole = diverges(losses, 300).unwrap();
    let mut detector = Divergence::default();
    for step in 1..=300 {
        let json = serde_json::to_string(&detector).unwrap();
        detector = serde_json::from_str(&json).unwrap();
        assert_eq!(detector.trouble(), (step > 90).then_some(89));
        if let Some(finding) = detector.observe(step, losses(step), false, DIVERGENCE) {
            assert_eq!((step, finding), whole);
            return;
        }
    }
    panic!("nothing was found");
}

/// What the detector says about evaluations of `(updates, nats per token, tokens predicted)` of a text of 300.
fn collapses(evaluations: &[(usize, f64, f64)]) -> Option<Finding> {
    let mut detector = Collapse::default();
    evaluations.iter().find_map(|&(step, nats, predicted_tokens)| {
        let diversity = Diversity { predicted_tokens, label_tokens: 300. };
        detector.observe(step, nats, diversity, COLLAPSE)
    })
}

#[test]
fn collapse_is_few_tokens_at_the_loss_of_frequencies() {
    // Frequencies alone give ln 300 = 5.70 nats.
    let young = [(100, 7., 1.), (200, 6., 1.2), (300, 5.8, 1.), (400, 5.7, 2.)];
    assert_eq!(collapses(&young), None);
    let learned = [(500, 4.5, 60.), (600, 4., 90.), (2000, 3., 120.)];
    assert_eq!(collapses(&[&young[..], &learned].concat()), None);
    // After it had learned, young or not.
    let fallen = [(700, 6., 3.), (800, 5.9, 1.), (900, 5.8, 1.)];
    let finding = collapses(&[&young[..], &learned[..2], &fallen].concat()).unwrap();
    assert_eq!(finding.since, 601);
    assert!(finding.reason.contains("collapsed to 1.0 tokens"), "{}", finding.reason);
    // Never learned anything.
    let dull: Vec<_> = (1..20).map(|i| (100 * i, 5.75, 1.)).collect();
    assert_eq!(collapses(&dull).unwrap().since, 901);
    // A bad evaluation or two are not enough, nor are few tokens at a good loss, nor a bad loss of many.
    let shaken = [(1000, 6., 1.), (1100, 6., 1.), (1200, 4., 70.), (1300, 6., 1.), (1400, 6., 1.)];
    assert_eq!(collapses(&[&learned[..2], &shaken].concat()), None);
    let terse: Vec<_> = (10..30).map(|i| (100 * i, 4., 5.)).collect();
    assert_eq!(collapses(&terse), None);
    let varied: Vec<_> = (10..30).map(|i| (100 * i, 6., 200.)).collect();
    assert_eq!(collapses(&varied), None);
}

#[test]
fn effective_numbers() {
    assert_eq!(effective_number(&[]), 0.);
    assert_eq!(effective_number(&[0, 7, 0]), 1.);
    assert!((effective_number(&[5, 5, 0, 5, 5]) - 4.).abs() < 1e-12);
    let skewed = effective_number(&[97, 1, 1, 1]);
    assert!(skewed > 1. && skewed < 1.3, "{skewed}");
}
