use super::elf::tests::program;
use super::*;

const X86_64: u16 = 62;
const AARCH64: u16 = 183;
/// A header of a program that is loaded, and one that names a loader.
const LOAD: u32 = 1;
const INTERPRETER: u32 = 3;

fn source(path: &Path) -> AgentSource {
    AgentSource::choose(Some(path), None, None)
}

#[test]
fn who_says_more_comes_first() {
    let (given, variable, executable) = (Path::new("/given"), PathBuf::from("/variable"), Path::new("/opt/pika-cloud"));
    let all = AgentSource::choose(Some(given), Some(variable.clone()), Some(executable));
    assert_eq!((all.path(), all.origin), (given, Origin::Given));
    let two = AgentSource::choose(None, Some(variable), Some(executable));
    assert_eq!((two.path(), two.origin), (Path::new("/variable"), Origin::Variable));
    let one = AgentSource::choose(None, None, Some(executable));
    assert_eq!((one.path(), one.origin), (Path::new("/opt/pika-guest"), Origin::Beside));
}

#[test]
fn an_agent_is_its_bytes_and_their_digest() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent");
    let bytes = program(X86_64, LOAD);
    std::fs::write(&path, &bytes).unwrap();
    let agent = source(&path).load("x86_64").unwrap();
    assert_eq!((&agent.bytes[..], agent.digest), (&bytes[..], Digest::of(&bytes)));
}

#[test]
fn one_for_the_instances_architecture_comes_first() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent");
    std::fs::write(&path, program(X86_64, LOAD)).unwrap();
    let source = source(&path);
    let error = source.load("aarch64").unwrap_err();
    assert!(matches!(error, AgentError::Architecture { .. }));
    let words = error.to_string();
    for word in [path.to_str().unwrap(), "x86_64", "is aarch64", "agent-aarch64", "--agent"] {
        assert!(words.contains(word), "`{word}` is not in: {words}");
    }
    std::fs::write(folder.path().join("agent-aarch64"), program(AARCH64, LOAD)).unwrap();
    assert_eq!(source.load("aarch64").unwrap().architecture, "aarch64");
    assert_eq!(source.load("x86_64").unwrap().architecture, "x86_64");
    // What Incus says is not trusted to be a name.
    assert!(source.load("../x86_64").is_err());
}

#[test]
fn what_cannot_be_used_is_told_with_its_path_and_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("script"), "#!/bin/sh\n").unwrap();
    std::fs::write(at("dynamic"), program(X86_64, INTERPRETER)).unwrap();
    std::fs::create_dir(at("folder")).unwrap();
    for (name, says) in
        [("absent", "no pika-guest"), ("script", "no Linux program"), ("dynamic", "dynamically"), ("folder", "no file")]
    {
        let words = source(&at(name)).load("x86_64").unwrap_err().to_string();
        for word in [at(name).to_str().unwrap(), says, "--agent", AGENT_VARIABLE] {
            assert!(words.contains(word), "`{word}` is not in: {words}");
        }
    }
}

/// Ten thousand runtimes share one copy; an operator who mends the file need not start anew.
#[test]
fn a_file_is_read_once_until_it_changes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent");
    std::fs::write(&path, program(X86_64, LOAD)).unwrap();
    let source = source(&path);
    let (first, second) = (source.load("x86_64").unwrap(), source.clone().load("x86_64").unwrap());
    assert_eq!(first.bytes.as_ptr(), second.bytes.as_ptr());
    let mut newer = program(X86_64, LOAD);
    newer.push(1);
    std::fs::write(folder.path().join("newer"), &newer).unwrap();
    std::fs::rename(folder.path().join("newer"), &path).unwrap();
    assert_eq!(source.load("x86_64").unwrap().digest, Digest::of(&newer));
}
