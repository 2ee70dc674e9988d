//! `bitnet_model::hub` against a Hub on the loopback interface: what is fetched, where it lands, and what happens when
//! things go wrong.

#![allow(clippy::unwrap_used)]

mod hub_datasets;
mod support {
    pub mod hub_fixture;
    pub mod hub_server;
}

use std::{
    fs,
    net::TcpListener,
    path::Path,
    time::{Duration, Instant},
};

use bitnet_model::{Error, Result, hub::ModelFiles};
use support::{
    hub_fixture::{ALWAYS, COMMIT, Fixture, NEXT, REPO, WEIGHTS, hub_with, repository},
    hub_server::{Fault, Files, Request, etag},
};

fn reason(result: Result<ModelFiles>) -> String {
    result.expect_err("an error").to_string()
}

fn assert_says(result: Result<ModelFiles>, words: &[&str]) {
    let reason = reason(result);
    for word in words {
        assert!(reason.contains(word), "{reason:?} does not say {word:?}");
    }
}

/// An endpoint where no one listens.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn bodies(log: &[Request]) -> Vec<&Request> {
    log.iter()
        .filter(|request| request.method == "GET" && !request.path.contains("/revision/"))
        .collect()
}

#[test]
fn a_download_has_the_layout_python_expects() {
    let it = Fixture::new();
    let files = it.hub().resolve(REPO).unwrap();
    it.assert_whole();
    assert_eq!(files.source, REPO);
    assert_eq!(files.root, it.snapshot());
    assert_eq!(files.config, it.snapshot().join("config.json"));
    assert_eq!(files.tokenizer, Some(it.snapshot().join("tokenizer.json")));
    assert_eq!(files.tokenizer_config, None);
    assert_eq!(files.chat_template, None);
    assert_eq!(files.weights, [it.snapshot().join(WEIGHTS)]);

    assert_eq!(fs::read_to_string(it.repo().join("refs/main")).unwrap(), COMMIT);
    assert_eq!(fs::read(it.blob(WEIGHTS)).unwrap(), repository(1)[WEIGHTS]);
    assert!(!it.snapshot().join("README.md").exists());
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(&files.config).unwrap(),
        Path::new("../../blobs").join(it.blob("config.json").file_name().unwrap())
    );

    it.server.take_log();
    assert_eq!(it.hub().download(REPO).unwrap(), files);
    let log = it.server.take_log();
    assert_eq!(log.len(), 1, "the listing alone: {log:?}");
}

#[test]
fn revisions_are_branches_tags_and_commits() {
    let it = Fixture::new();
    it.server.commit("refs/pr/1", NEXT, repository(2));
    it.server.commit("v1.0", COMMIT, repository(1));
    for (revision, version) in [("refs/pr/1", 2), ("v1.0", 1), (NEXT, 2), (COMMIT, 1)] {
        let files = it.hub().revision(revision).download(REPO).unwrap();
        assert_eq!(fs::read(&files.config).unwrap(), repository(version)["config.json"]);
    }
    let refs = it.repo().join("refs");
    assert_eq!(fs::read_to_string(refs.join("refs/pr/1")).unwrap(), NEXT);
    assert_eq!(fs::read_to_string(refs.join("v1.0")).unwrap(), COMMIT);
    assert!(!refs.join(NEXT).exists());
    assert_says(it.hub().revision("v9").download(REPO), &[REPO, "no revision `v9`"]);
    assert_says(it.hub().revision("../v9").download(REPO), &["`../v9` is no branch"]);
}

#[test]
fn a_reference_moves_only_when_its_commit_is_complete() {
    let it = Fixture::new();
    it.hub().download(REPO).unwrap();
    it.server.commit("main", NEXT, repository(2));
    it.server.fault("GET", "/lfs/", Fault::Truncate(1000), ALWAYS);
    assert_says(it.impatient().download(REPO), &["`model.safetensors`", "300000"]);
    assert_eq!(it.hub().offline(true).download(REPO).unwrap().root, it.snapshot());
    it.server.clear_faults();
    let files = it.hub().download(REPO).unwrap();
    assert_eq!(fs::read(&files.weights[0]).unwrap(), repository(2)[WEIGHTS]);
    assert_eq!(it.hub().offline(true).download(REPO).unwrap(), files);
}

#[test]
fn offline_uses_the_cache_or_says_what_it_lacks() {
    let it = Fixture::new();
    let offline = || it.hub().offline(true);
    let hint = "HF_HUB_OFFLINE is set: unset it or run `bitnet download` first";
    let cache = it.cache();
    assert_says(offline().download(REPO), &["not in the cache", cache.to_str().unwrap(), hint]);
    it.hub().download(REPO).unwrap();
    it.server.take_log();
    for revision in ["main", COMMIT] {
        it.assert_whole();
        assert_eq!(offline().revision(revision).resolve(REPO).unwrap().root, it.snapshot());
    }
    assert_says(offline().revision("v1.0").download(REPO), &["`v1.0` is not in the cache", hint]);
    fs::remove_file(it.blob(WEIGHTS)).unwrap();
    assert_says(offline().download(REPO), &["not complete", "no `model.safetensors`", hint]);
    assert!(it.server.take_log().is_empty());
    it.hub().download(REPO).unwrap();
    it.assert_whole();
}

#[test]
fn without_a_network_the_cache_is_used() {
    let it = Fixture::new();
    let nobody = &nobody();
    assert_says(it.hub().endpoint(nobody).resolve(REPO), &[nobody, "cannot reach", "no such path"]);
    it.hub().download(REPO).unwrap();
    assert_eq!(it.hub().endpoint(nobody).download(REPO).unwrap().root, it.snapshot());
    it.server.fault("GET", "/revision/", Fault::Answer(503, vec![], ""), ALWAYS);
    assert_eq!(it.hub().download(REPO).unwrap().root, it.snapshot());
    assert_says(it.hub().endpoint("huggingface.co").download(REPO), &["HF_ENDPOINT"]);
}

#[test]
fn the_environment_places_the_cache() {
    let it = Fixture::new();
    let home = it.folder.path().join("home");
    let vars = [("HF_HOME", home.to_str().unwrap()), ("HF_ENDPOINT", &it.server.endpoint())];
    let files = hub_with(&vars).download(REPO).unwrap();
    assert!(files.root.starts_with(home.join("hub/models--org--tiny-b1.58")));
    let elsewhere = it.folder.path().join("elsewhere");
    let files = hub_with(&vars).cache_dir(&elsewhere).download(REPO).unwrap();
    assert!(files.root.starts_with(&elsewhere));
    let offline = hub_with(&[vars[0], ("HF_HUB_OFFLINE", "1")]).download(REPO).unwrap();
    assert!(offline.root.starts_with(&home));
}

#[test]
fn the_token_goes_to_the_endpoint_alone() {
    let it = Fixture::new();
    it.server.require_token("hf_secret");
    it.hub().token(Some("hf_secret".to_string())).download(REPO).unwrap();
    it.assert_whole();
    let log = it.server.take_log();
    assert!(log.iter().any(|request| request.cdn));
    for request in log {
        let sent = request.header("authorization");
        assert_eq!(sent, (!request.cdn).then_some("Bearer hf_secret"), "{request:?}");
    }
}

#[test]
fn refusals_are_explained() {
    let it = Fixture::new();
    let other = it.hub().download("org/other");
    assert_says(other, &["org/other: there is no such repository at http://127.0.0.1"]);
    let gone = vec![("X-Error-Code", "EntryNotFound".to_string())];
    it.server.fault("HEAD", "tokenizer.json", Fault::Answer(404, gone, ""), 1);
    assert_says(it.hub().download(REPO), &["`main` has no file `tokenizer.json`"]);
    it.server.fault("GET", "/revision/", Fault::Answer(418, vec![], ""), 1);
    assert_says(it.hub().download(REPO), &["answered 418"]);

    let page = format!("{}/{REPO}", it.server.endpoint());
    it.server.require_token("hf_right");
    assert_says(
        it.hub().download(REPO),
        &["401", "Invalid username or password", "gated or private", "set HF_TOKEN", &page],
    );
    let wrong = it.hub().token(Some("hf_wrong".to_string()));
    let refused = reason(wrong.download(REPO));
    assert!(refused.contains("token is invalid") && !refused.contains("hf_wrong"), "{refused}");
    let gated = vec![("X-Error-Message", format!("Access is restricted.{}", "!".repeat(999)))];
    it.server.fault("HEAD", "tokenizer.json", Fault::Answer(403, gated, ""), 1);
    let right = it.hub().token(Some("hf_right".to_string()));
    let refused = reason(right.download(REPO));
    assert!(refused.contains("403") && refused.contains("Access is restricted."), "{refused}");
    assert!(refused.contains(&page) && refused.len() < 700, "{refused}");
}

#[test]
fn a_cut_download_is_resumed_by_the_next() {
    let it = Fixture::new();
    it.server.fault("GET", "/lfs/", Fault::Truncate(100_000), 1);
    let cut = it.impatient().download(REPO);
    assert_says(cut, &["`model.safetensors`", "failed 1 time(s)"]);
    it.assert_invisible();
    // A proxy's page in place of the file costs nothing of what is there.
    it.server.fault("GET", "/lfs/", Fault::Answer(200, vec![], "<html>"), 1);
    assert_says(it.impatient().download(REPO), &["has 300000 bytes, the server sends one of 6"]);
    it.server.take_log();
    it.impatient().download(REPO).unwrap();
    it.assert_whole();
    let log = it.server.take_log();
    let ranges: Vec<_> = bodies(&log).iter().map(|request| request.header("range")).collect();
    assert_eq!(ranges, [Some("bytes=100000-"); 2], "the endpoint, then the cdn: {log:?}");
}

#[test]
fn any_number_of_cuts_is_survived_while_the_file_grows() {
    let it = Fixture::new();
    it.server.fault("GET", "/lfs/", Fault::Truncate(20_000), 12);
    it.hub().download(REPO).unwrap();
    it.assert_whole();
}

#[test]
fn passing_faults_are_retried() {
    let unavailable = || Fault::Answer(503, vec![], "");
    let faults: [(&str, &str, Fault); 9] = [
        ("GET", "/revision/", unavailable()),
        ("GET", "/revision/", Fault::Reset),
        ("GET", "/revision/", Fault::Truncate(5)),
        ("HEAD", WEIGHTS, unavailable()),
        ("HEAD", "config.json", Fault::Reset),
        ("GET", "config.json", Fault::Truncate(3)),
        ("GET", "/lfs/", Fault::Reset),
        ("GET", "/lfs/", Fault::Stall(Duration::from_secs(2))),
        ("GET", "/lfs/", Fault::Overrun),
    ];
    for (method, path, fault) in faults {
        let it = Fixture::new();
        it.server.fault(method, path, fault, 1);
        let started = Instant::now();
        it.hub().timeout(Duration::from_millis(200)).download(REPO).unwrap();
        assert!(started.elapsed() < Duration::from_millis(1500), "{method} {path}");
        it.assert_whole();
    }
}

#[test]
fn lasting_faults_end_in_an_error() {
    let unavailable = || Fault::Answer(500, vec![], "");
    for (method, path, fault, words) in [
        (
            "GET",
            "/revision/",
            unavailable(),
            "failed 3 time(s) in a row, the last time with: 127.0.0.1 answered 500",
        ),
        ("HEAD", WEIGHTS, unavailable(), "`model.safetensors`: "),
        ("GET", "/lfs/", Fault::Reset, "`model.safetensors`: "),
        ("GET", "/lfs/", Fault::Truncate(0), "`model.safetensors`: "),
        ("GET", "/lfs/", Fault::Overrun, "more bytes than the file has"),
        ("GET", "/lfs/", Fault::Corrupt, "SHA-256"),
    ] {
        let it = Fixture::new();
        it.server.fault(method, path, fault, ALWAYS);
        assert_says(it.hub().download(REPO), &[words, "failed 3 time(s)"]);
        it.assert_invisible();
        it.server.clear_faults();
        it.hub().download(REPO).unwrap();
        it.assert_whole();
    }
}

#[test]
fn a_wait_the_server_asks_for_is_honoured() {
    let it = Fixture::new();
    let busy = Fault::Answer(429, vec![("Retry-After", "1".to_string())], "");
    it.server.fault("GET", "/revision/", busy, 1);
    let started = Instant::now();
    it.hub().download(REPO).unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1));
}

#[test]
fn what_a_part_file_holds_is_not_trusted() {
    let whole = repository(1)[WEIGHTS].clone();
    let mut wrong = whole.clone();
    wrong[7] ^= 1;
    let parts =
        [&whole[..], &whole[..10], &wrong[..], &wrong[..100], &[&whole[..], b"more"].concat()];
    for part in parts {
        let it = Fixture::new();
        fs::create_dir_all(it.repo().join("blobs")).unwrap();
        fs::write(it.blob(WEIGHTS).with_added_extension("incomplete"), part).unwrap();
        it.hub().download(REPO).unwrap();
        it.assert_whole();
    }
    let it = Fixture::new();
    it.server.fault("GET", "/lfs/", Fault::Truncate(100_000), 1);
    it.server.fault("GET", "/lfs/", Fault::IgnoreRange, ALWAYS);
    it.hub().download(REPO).unwrap();
    it.assert_whole();
    // A blob of another length than the Hub names was left by something that died.
    fs::write(it.blob(WEIGHTS), b"short").unwrap();
    fs::remove_file(it.snapshot().join(WEIGHTS)).unwrap();
    it.hub().download(REPO).unwrap();
    it.assert_whole();
}

#[test]
fn two_at_once_download_once() {
    let it = Fixture::new();
    it.server.fault("GET", "/lfs/", Fault::Delay(Duration::from_millis(300)), 1);
    std::thread::scope(|scope| {
        let both = [0, 1].map(|_| scope.spawn(|| it.hub().download(REPO).unwrap()));
        let [a, b] = both.map(|one| one.join().unwrap());
        assert_eq!(a, b);
    });
    it.assert_whole();
    let log = it.server.take_log();
    assert_eq!(log.iter().filter(|request| request.cdn).count(), 1, "{log:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named() {
    let it = Fixture::new();
    fs::create_dir_all(it.repo().join("blobs")).unwrap();
    let part = it.blob(WEIGHTS).with_added_extension("incomplete");
    std::os::unix::fs::symlink("/dev/full", part).unwrap();
    let error = it.hub().download(REPO).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    let error = error.to_string();
    assert!(error.contains("No space left") && error.contains("HF_HUB_CACHE"), "{error}");
    it.assert_invisible();
}

#[test]
fn shards_are_fetched_as_the_index_names_them() {
    let it = Fixture::new();
    let shards = ["model-00001-of-00002.safetensors", "part/model-00002-of-00002.safetensors"];
    let index = format!(
        r#"{{"weight_map": {{"b": "{1}", "a": "{0}", "c": "{0}"}}}}"#,
        shards[0], shards[1]
    );
    let files = Files::from([
        ("config.json".to_string(), b"{}".to_vec()),
        ("model.safetensors.index.json".to_string(), index.into_bytes()),
        (shards[0].to_string(), vec![1; 10]),
        (shards[1].to_string(), vec![2; 10]),
        ("model-00003-of-00002.safetensors".to_string(), vec![3; 10]),
    ]);
    it.server.commit("main", NEXT, files);
    let found = it.hub().download(REPO).unwrap();
    assert_eq!(found.weights, shards.map(|shard| found.root.join(shard)));
    assert_eq!(fs::read(&found.weights[1]).unwrap(), [2; 10]);
    assert!(!found.root.join("model-00003-of-00002.safetensors").exists());
    assert_eq!(it.hub().offline(true).download(REPO).unwrap(), found);
}

#[test]
fn hostile_servers_write_nowhere_else() {
    let json =
        |sha: &str| format!(r#"{{"sha": "{sha}", "siblings": [{{"rfilename": "config.json"}}]}}"#);
    for body in [&json("../../x"), &json(""), &json("a/b"), "[]", "<html>", r#"{"sha": 1}"#] {
        let it = Fixture::new();
        let body: &'static str = body.to_string().leak();
        it.server.fault("GET", "/revision/", Fault::Answer(200, vec![], body), 1);
        assert_says(it.hub().download(REPO), &["does not answer like a Hub"]);
        assert!(!it.cache().exists());
    }
    for etag in ["../../../evil", "..", "", "a\\b"] {
        let it = Fixture::new();
        let headers = vec![("ETag", format!("\"{etag}\""))];
        it.server.fault("HEAD", "config.json", Fault::Answer(200, headers, ""), 1);
        assert_says(it.hub().download(REPO), &["`config.json`", "etag"]);
        assert!(!it.cache().exists());
    }
    let it = Fixture::new();
    let around = vec![("Location", format!("/{REPO}/resolve/{COMMIT}/config.json"))];
    it.server.fault("HEAD", "config.json", Fault::Answer(302, around, ""), ALWAYS);
    assert_says(it.hub().download(REPO), &["redirects more than 10 times"]);

    let it = Fixture::new();
    for shard in ["../../../../../evil.safetensors", "/tmp/evil.safetensors"] {
        let index = format!(r#"{{"weight_map": {{"a": "{shard}"}}}}"#);
        let files = Files::from([
            ("config.json".to_string(), b"{}".to_vec()),
            ("model.safetensors.index.json".to_string(), index.into_bytes()),
        ]);
        it.server.commit("main", etag("", shard.as_bytes()).as_str(), files);
        assert_says(
            it.hub().download(REPO),
            &["model.safetensors.index.json", "below this folder"],
        );
    }
}

#[test]
fn a_repository_without_a_model_says_what_it_has() {
    let it = Fixture::new();
    let only = |names: &[&str]| names.iter().map(|name| (name.to_string(), vec![0])).collect();
    it.server.commit("main", COMMIT, only(&["config.json", "pytorch_model.bin"]));
    assert_says(it.hub().download(REPO), &[REPO, "only `pytorch_model.bin`", "safetensors format"]);
    it.server.commit("main", COMMIT, only(&[WEIGHTS]));
    assert_says(it.hub().download(REPO), &["no `config.json`"]);
    assert!(!it.cache().exists());
}

#[test]
fn a_gguf_file_is_all_of_a_model() {
    let it = Fixture::new();
    let files = |names: &[&str]| {
        names.iter().map(|name| (name.to_string(), name.as_bytes().to_vec())).collect()
    };
    it.server.commit("main", COMMIT, files(&["README.md", "config.json", "a.gguf"]));
    let found = it.hub().resolve(REPO).unwrap();
    assert_eq!(found.weights, [it.snapshot().join("a.gguf")]);
    assert_eq!(fs::read(&found.weights[0]).unwrap(), b"a.gguf");
    assert!(!it.snapshot().join("config.json").exists());
    assert_eq!(it.hub().offline(true).resolve(REPO).unwrap(), found);

    it.server.commit("main", NEXT, files(&["a.gguf", "b.gguf", "part/c.gguf"]));
    assert_says(it.hub().resolve(REPO), &["2 GGUF files", "`a.gguf`, `b.gguf`"]);
    for name in ["b.gguf", "part/c.gguf"] {
        let one = it.hub().resolve(&format!("{REPO}/{name}")).unwrap();
        assert!(one.weights[0].ends_with(name));
        assert_eq!(fs::read(&one.weights[0]).unwrap(), name.as_bytes());
    }
    assert_says(it.hub().resolve(&format!("{REPO}/d.gguf")), &[REPO, "none of the 3 files"]);
}

#[test]
fn folders_and_files_need_no_hub() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let hub = hub_with(&[]).endpoint(nobody());
    let resolve = |path: &Path| hub.resolve(path.to_str().unwrap());
    assert_says(
        resolve(root),
        &[root.to_str().unwrap(), "no `config.json` and no `model.safetensors`"],
    );
    fs::write(root.join("model-q.bin"), "").unwrap();
    assert_says(resolve(root), &["only `model-q.bin`"]);
    assert_says(resolve(&root.join("model-q.bin")), &["PyTorch", "convert them to safetensors"]);
    let file = root.join("model-q.gguf");
    fs::write(&file, "").unwrap();
    for source in [root, &file] {
        assert_eq!(resolve(source).unwrap().weights, [file.as_path()]);
    }
    fs::write(root.join("model-r.gguf"), "").unwrap();
    assert_says(resolve(root), &["2 GGUF files", "`model-q.gguf`, `model-r.gguf`"]);
    fs::write(root.join("mine.safetensors"), "").unwrap();
    assert_says(resolve(&root.join("mine.safetensors")), &["no `config.json`"]);
    fs::write(root.join("config.json"), "{}").unwrap();
    let one = resolve(&root.join("mine.safetensors")).unwrap();
    assert_eq!((one.root.as_path(), one.weights), (root, vec![root.join("mine.safetensors")]));

    fs::write(
        root.join("model.safetensors.index.json"),
        r#"{"weight_map": {"a": "2.safetensors"}}"#,
    )
    .unwrap();
    assert_says(resolve(root), &["names `2.safetensors`, which is missing"]);
    fs::write(root.join("2.safetensors"), "").unwrap();
    assert_eq!(resolve(root).unwrap().weights, [root.join("2.safetensors")]);
    fs::write(root.join(WEIGHTS), "").unwrap();
    fs::write(root.join("chat_template.jinja"), "").unwrap();
    let all = resolve(root).unwrap();
    assert_eq!(all.weights, [root.join(WEIGHTS)]);
    assert_eq!(all.chat_template, Some(root.join("chat_template.jinja")));

    for neither in ["no-such-model", "./no/such", "/no/such/folder", "org/name/more"] {
        assert_says(hub.resolve(neither), &[neither, "no such file or folder", "`org/name`"]);
    }
}
