//! The command as a user meets it, on any machine: no root, no module, no device.

use std::process::{Command, Output};

use serde_json::Value;

fn peerbuf(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_peerbuf"))
        .args(arguments)
        .output()
        .unwrap()
}

fn json_lines(output: &Output) -> Vec<Value> {
    let text = std::str::from_utf8(&output.stdout).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn directory() -> &'static str {
    env!("CARGO_TARGET_TMPDIR")
}

#[test]
fn the_demo_moves_every_byte_whatever_the_size() {
    for size in ["0", "1", "4095", "4097", "65536", "1000001"] {
        let output = peerbuf(&["demo", "--json", "--size", size, "--dir", directory()]);
        assert!(output.status.success(), "{output:?}");
        let transfers = json_lines(&output);
        assert_eq!(transfers.len(), 4, "{output:?}");
        for transfer in &transfers {
            assert_eq!(transfer["verified"], true, "{transfer}");
            assert_eq!(transfer["bytes"].to_string(), size, "{transfer}");
            let mut fields: Vec<&str> = transfer
                .as_object()
                .unwrap()
                .keys()
                .map(String::as_str)
                .collect();
            fields.sort_unstable();
            let promised = [
                "buffer",
                "bytes",
                "host_bytes",
                "path",
                "reasons",
                "sink",
                "source",
                "verified",
            ];
            assert_eq!(fields, promised);
            for reason in transfer["reasons"].as_array().unwrap() {
                for field in ["path", "code", "evidence"] {
                    assert!(!reason[field].as_str().unwrap().is_empty(), "{transfer}");
                }
            }
        }
        // Each buffer is filled from a file, and then written to another.
        for pair in transfers.chunks(2) {
            assert_eq!(pair[0]["sink"], pair[0]["buffer"]);
            assert_eq!(pair[1]["source"], pair[1]["buffer"]);
            assert_ne!(pair[0]["source"], pair[1]["sink"]);
        }
    }
}

#[test]
fn a_machine_without_exporters_runs_on_stand_ins_and_names_what_is_missing() {
    if std::path::Path::new("/dev/peerbuf").exists()
        || std::path::Path::new("/dev/udmabuf").exists()
    {
        eprintln!("skipped: this machine has an exporter");
        return;
    }
    let output = peerbuf(&["demo", "--json", "--size", "64K", "--dir", directory()]);
    assert!(output.status.success());
    let transfers = json_lines(&output);
    assert_eq!(transfers[0]["buffer"], "memfd (stand-in for a BAR)");
    assert_eq!(transfers[2]["buffer"], "memfd (stand-in for a udmabuf)");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("missing: peerbuf.ko: open on /dev/peerbuf: ENOENT"),
        "{said}"
    );
    assert!(
        said.contains("missing: udmabuf: open on /dev/udmabuf: ENOENT"),
        "{said}"
    );
}

#[test]
fn the_demo_leaves_no_file() {
    let directory = std::path::Path::new(directory()).join("empty");
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.to_str().unwrap();
    assert!(
        peerbuf(&["demo", "--size", "64K", "--dir", path])
            .status
            .success()
    );
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
}

#[test]
fn the_table_has_each_transfer_and_the_evidence() {
    let output = peerbuf(&["demo", "--size", "64K", "--dir", directory()]);
    let text = String::from_utf8(output.stdout).unwrap();
    for words in ["path used", "second file", "every byte", "[1] not "] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
}

#[test]
fn no_line_on_standard_output_is_wider_than_columns_says_or_than_100() {
    for arguments in [
        &["info"][..],
        &["doctor"],
        &["topo", "--all"],
        &["ls"],
        &["demo", "--size", "1000001", "--dir", directory()],
        &["matrix", "--dir", directory()],
    ] {
        for (columns, width) in [
            (None, 100),
            (Some("200"), 100),
            (Some("80"), 80),
            (Some("60"), 60),
        ] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_peerbuf"));
            command.args(arguments).env_remove("COLUMNS");
            command.envs(columns.map(|columns| ("COLUMNS", columns)));
            let text = String::from_utf8(command.output().unwrap().stdout).unwrap();
            assert!(!text.is_empty());
            for line in text.lines() {
                // What the command prints has letters of one column only.
                let wide = line.chars().count();
                assert!(wide <= width, "{columns:?}: {wide} columns\n{line}\n{text}");
            }
        }
    }
}

#[test]
fn failures_end_with_1_and_wrong_usage_with_2() {
    let missing = peerbuf(&["demo", "--size", "4K", "--dir", "/nonexistent"]);
    assert_eq!(missing.status.code(), Some(1));
    let said = String::from_utf8(missing.stderr).unwrap();
    assert!(said.contains("/nonexistent: ENOENT"), "{said}");

    let no_device = peerbuf(&["export", "ffff:ff:1f.7", "--bar", "2", "--length", "4K"]);
    assert_eq!(no_device.status.code(), Some(1));
    let said = String::from_utf8(no_device.stderr).unwrap();
    assert!(said.contains("/dev/peerbuf/ffff:ff:1f.7"), "{said}");

    for usage in [
        &["nonsense"][..],
        &[],
        &["demo", "--size", "8X"],
        &["demo", "--device", "01:00.0"],
        &["export", "0000:01:00.0", "--bar", "6", "--length", "4K"],
        &["export", "0000:01:00.0", "--bar", "2"],
    ] {
        assert_eq!(peerbuf(usage).status.code(), Some(2), "{usage:?}");
    }
}

#[test]
fn info_works_on_any_machine_as_text_and_as_json() {
    let output = peerbuf(&["info", "--json"]);
    assert!(output.status.success());
    let info = &json_lines(&output)[0];
    assert!(
        info["kernel"]
            .as_str()
            .is_some_and(|kernel| !kernel.is_empty())
    );
    for list in ["devices", "disks", "missing"] {
        assert!(info[list].is_array(), "{info}");
    }
    let text = String::from_utf8(peerbuf(&["info"]).stdout).unwrap();
    assert!(text.starts_with("kernel "), "{text}");
    assert!(text.contains("\nudmabuf: "), "{text}");
}

#[test]
fn the_matrix_has_a_cell_for_each_pair_and_names_what_is_missing() {
    let output = peerbuf(&["matrix", "--json", "--dir", directory()]);
    assert!(output.status.success(), "{output:?}");
    let matrix = &json_lines(&output)[0];
    let cells = matrix["cells"].as_array().unwrap();
    let names = |key: &str| {
        let mut names: Vec<&Value> = cells.iter().map(|cell| &cell[key]).collect();
        names.dedup();
        names
    };
    let exporters = names("exporter").len();
    assert_eq!(cells.len() % exporters, 0, "{matrix}");
    let memfd = |cell: &&Value| cell["exporter"] == "memfd";
    for cell in cells.iter().filter(memfd) {
        let (outcome, path) = (&cell["outcome"], &cell["path"]);
        match cell["importer"].as_str().unwrap() {
            "CPU" => assert_eq!(
                (outcome, path),
                (&"bytes-checked".into(), &"shared-host-memory".into())
            ),
            "file" => assert_eq!(outcome, "bytes-checked"),
            _ => assert!(outcome != "failed" && outcome != "wrong-bytes", "{cell}"),
        }
    }
    for missing in matrix["missing"].as_array().unwrap() {
        for field in ["what", "remedy"] {
            assert!(!missing[field].as_str().unwrap().is_empty(), "{missing}");
        }
    }
    let markdown = peerbuf(&["matrix", "--markdown", "--dir", directory()]);
    let text = String::from_utf8(markdown.stdout).unwrap();
    assert!(text.starts_with('|') && text.contains("memfd"), "{text}");
    let both = peerbuf(&["matrix", "--markdown", "--json"]);
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn help_names_each_command_the_paths_and_the_exit_status() {
    let text = String::from_utf8(peerbuf(&["--help"]).stdout).unwrap();
    for words in [
        "demo",
        "doctor",
        "export",
        "info",
        "ls",
        "topo",
        "why",
        "matrix",
        "peer-to-peer",
        "Exit status",
    ] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
    assert!(!text.contains("demo-worker"));
}

#[test]
fn the_second_process_started_by_hand_says_what_it_is_for() {
    let output = peerbuf(&["demo-worker"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("peerbuf demo")
    );
}

#[test]
fn a_reader_that_leaves_early_is_no_panic() {
    for arguments in [&["info"][..], &["info", "--json"], &["demo", "--size", "1"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(env!("CARGO_BIN_EXE_peerbuf"))
            .args(arguments)
            .stdout(writer)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        let complains = |line: &str| line.contains("panicked") || line.starts_with("peerbuf:");
        assert!(!said.lines().any(complains), "{said}");
    }
}

/// A file of so many bytes of which no two blocks are alike, in the tests' directory.
fn file_of(name: &str, length: usize) -> (String, Vec<u8>) {
    let bytes: Vec<u8> = (0..length)
        .map(|at| (at * 31 + at / 512 * 7) as u8)
        .collect();
    let path = format!("{}/{name}", directory());
    std::fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

#[test]
fn a_copy_has_every_byte_and_a_receipt_whatever_the_size() {
    for size in [0, 1, 511, 4096, 4097, 1_000_001, 20_000_000] {
        let (from, bytes) = file_of("copy-from", size);
        let to = format!("{}/copy-to", directory());
        // What was there before is longer, and goes.
        std::fs::write(&to, vec![7; size + 5000]).unwrap();
        let output = peerbuf(&["copy", &from, &to, "--check", "--json"]);
        assert!(output.status.success(), "{output:?}");
        assert!(std::fs::read(&to).unwrap() == bytes, "{size} bytes");
        let receipt = &json_lines(&output)[0];
        assert_eq!(receipt["bytes"], size, "{receipt}");
        assert_eq!(receipt["checked"], true, "{receipt}");
        for leg in receipt["legs"].as_array().unwrap() {
            assert_eq!(leg["bytes"], size, "{receipt}");
            assert!(!leg["queue"].as_str().unwrap().is_empty(), "{receipt}");
        }
    }
}

#[test]
fn a_copy_into_memory_tells_its_path_and_how_it_got_there() {
    let (from, _) = file_of("copy-memory", 3_000_000);
    let output = peerbuf(&["copy", &from, "memfd:", "--check", "--json", "--queue", "7"]);
    assert!(output.status.success(), "{output:?}");
    let receipt = &json_lines(&output)[0];
    let leg = &receipt["legs"][0];
    assert_eq!(leg["host_bytes"], 3_000_000, "{receipt}");
    let copied = leg["copied"].as_u64().unwrap();
    match leg["path"].as_str().unwrap() {
        "shared-host-memory" => assert!(copied < 4096, "{receipt}"),
        "staged-copy" => assert_eq!(copied, 3_000_000, "{receipt}"),
        other => panic!("{other}: {receipt}"),
    }
}

#[test]
fn a_copy_to_a_gpu_that_is_not_there_names_what_was_tried() {
    let (from, _) = file_of("gpu", 1000);
    for (gpu, library) in [("cuda:77", "libcuda.so.1"), ("ze:77", "libze_loader.so.1")] {
        let output = peerbuf(&["copy", &from, gpu]);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        // A machine that has the library lacks the device.
        assert!(said.contains(library) || said.contains("77"), "{said}");
    }
    std::fs::remove_file(from).unwrap();
    for wrong in ["cuda:x", "cuda:-1"] {
        let output = peerbuf(&["export", "--gpu", wrong, "--length", "4K"]);
        assert_eq!(output.status.code(), Some(2));
    }
    let output = peerbuf(&["info", "--json"]);
    let info = &json_lines(&output)[0];
    assert_eq!(info["gpu_runtimes"].as_array().unwrap().len(), 3);
    assert_eq!(info["gpu_runtimes"][0]["library"], "libcuda.so.1");
}

#[test]
fn a_copy_goes_through_pipes() {
    use std::io::Write;
    use std::process::Stdio;
    let (from, bytes) = file_of("copy-pipe", 17_000_003);
    let output = peerbuf(&["copy", &from, "-"]);
    assert!(output.status.success() && output.stdout == bytes);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("17000003 from"), "{said}");
    let to = format!("{}/copy-pipe-to", directory());
    let mut child = Command::new(env!("CARGO_BIN_EXE_peerbuf"))
        .args(["copy", "-", &to, "--check"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(std::fs::read(&to).unwrap() == bytes);
}

#[test]
fn a_copy_that_does_not_write_every_byte_fails() {
    let (from, _) = file_of("copy-fails", 100_000);
    for (arguments, status, said) in [
        (&["copy", &from, "/dev/full"][..], 1, "No space left"),
        (
            &["copy", &from, "memfd:", "--size", "1M"],
            1,
            "has 100000 bytes",
        ),
        (&["copy", "/nonexistent", "memfd:"], 1, "ENOENT"),
        (&["copy", "-", "memfd:"], 1, "--size"),
        (&["copy", &from, "-", "--check"], 1, "cannot be read again"),
        (&["copy", &from, "bar:nonsense"], 2, "nonsense"),
        (&["copy", &from, "fd:999"], 1, "descriptor 999"),
    ] {
        let output = peerbuf(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {error}");
        assert!(error.contains(said), "{arguments:?}: {error}");
    }
}

/// A safetensors file of so many tensors of odd lengths, and the bytes of each by its name.
fn model(name: &str, tensors: usize) -> (String, Vec<(String, Vec<u8>)>) {
    let mut header = serde_json::json!({"__metadata__": {"format": "pt"}});
    let (mut data, mut all) = (Vec::new(), Vec::new());
    for index in 0..tensors {
        let length = index * 37 % 5000 * 4;
        let bytes: Vec<u8> = (0..length).map(|at| (at * 13 + index) as u8).collect();
        header[format!("layer.{index}")] = serde_json::json!({
            "dtype": "F32",
            "shape": [length / 4],
            "data_offsets": [data.len(), data.len() + length],
        });
        data.extend(&bytes);
        all.push((format!("layer.{index}"), bytes));
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(&header);
    file.extend(&data);
    let path = format!("{}/{name}", directory());
    std::fs::write(&path, file).unwrap();
    (path, all)
}

/// The same as a GGUF file, with gaps between the tensors.
fn gguf(name: &str, tensors: usize) -> (String, Vec<(String, Vec<u8>)>) {
    fn text(into: &mut Vec<u8>, text: &str) {
        into.extend((text.len() as u64).to_le_bytes());
        into.extend(text.as_bytes());
    }
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    for count in [tensors as u64, 1] {
        file.extend(count.to_le_bytes());
    }
    text(&mut file, "general.name");
    file.extend(8_u32.to_le_bytes());
    text(&mut file, name);
    let (mut data, mut all) = (Vec::new(), Vec::new());
    for index in 0..tensors {
        let length = index * 37 % 5000 * 2;
        let bytes: Vec<u8> = (0..length).map(|at| (at * 11 + index) as u8).collect();
        text(&mut file, &format!("blk.{index}"));
        file.extend(1_u32.to_le_bytes());
        file.extend((length as u64 / 2).to_le_bytes());
        file.extend(1_u32.to_le_bytes()); // F16
        file.extend((data.len() as u64).to_le_bytes());
        data.extend(&bytes);
        data.resize(data.len().next_multiple_of(32), 0xee);
        all.push((format!("blk.{index}"), bytes));
    }
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(&data);
    let path = format!("{}/{name}", directory());
    std::fs::write(&path, file).unwrap();
    (path, all)
}

#[test]
fn a_model_is_loaded_and_lent_with_each_tensor_in_its_place() {
    is_loaded_and_lent("safetensors", model("model.safetensors", 300), 100);
    // Each is a request, where they do not follow each other.
    is_loaded_and_lent("gguf", gguf("model.gguf", 300), 1000);
}

fn is_loaded_and_lent(format: &str, (path, tensors): (String, Vec<(String, Vec<u8>)>), most: u64) {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    let socket = format!("{}/load-{format}-{}", directory(), std::process::id());
    let mut child = Command::new(env!("CARGO_BIN_EXE_peerbuf"))
        .args([
            "load", &path, "--to", "memfd:", "--check", "--json", "--share", &socket,
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let loaded: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(loaded["checked"], true);
    assert!(lines.next().unwrap().unwrap().contains("lent at"));
    let subscriber = peerbuf::share::Subscriber::connect(&socket).unwrap();
    let lent = subscriber.buffer("model").unwrap();
    let list = subscriber.buffer("model.json").unwrap();
    let list: Vec<Value> = serde_json::from_slice(&list.whole().to_vec().unwrap()).unwrap();
    assert_eq!(list.len(), tensors.len());
    for (name, bytes) in &tensors {
        let place = list.iter().find(|tensor| tensor["name"] == **name).unwrap();
        let number = |field| place[field].as_u64().unwrap();
        let range = lent.range(number("offset"), number("length")).unwrap();
        assert!(range.to_vec().unwrap() == *bytes, "{name}");
    }
    // One run of bytes in the file is one run in the buffer: no request for each tensor.
    let requests = loaded["receipt"]["requests"].as_u64().unwrap();
    assert!(requests < most, "{format}: {requests}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_model_that_breaks_a_rule_is_refused() {
    let (path, _) = model("cut.safetensors", 20);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let length = file.metadata().unwrap().len();
    for (length, said) in [(length - 1, "for them"), (100, "header"), (3, "header")] {
        file.set_len(length).unwrap();
        let output = peerbuf(&["load", &path, "--to", "memfd:"]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(
            error.contains(said) && error.contains("cut.safetensors"),
            "{error}"
        );
    }
    let (path, _) = gguf("cut.gguf", 20);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    for (length, said) in [
        (2000, "\"blk.5\" ends beyond"),
        (100, "offset of tensor \"blk.0\""),
        (20, "number"),
    ] {
        file.set_len(length).unwrap();
        let output = peerbuf(&["load", &path, "--to", "memfd:"]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(
            error.contains(said) && error.contains("cut.gguf"),
            "{error}"
        );
    }
}

/// A disk and a card below ports of their own, on a host bridge that the kernel trusts or does not.
fn snapshot(name: &str, host: &str) -> String {
    let file = format!("{}/{name}.lspci", directory());
    let text = format!(
        "00:00.0 Host bridge [0600]: Intel Corporation Device [{host}]\n\
         \tControl: I/O- Mem+\n\tCapabilities: [40] Express (v2) Root Complex Integrated Endpoint, IntMsgNum 0\n\n\
         00:01.0 PCI bridge [0604]: Port [8086:2030]\n\tControl: I/O- Mem+\n\
         \tBus: primary=00, secondary=01, subordinate=01, sec-latency=0\n\
         \tCapabilities: [40] Express (v2) Root Port (Slot+), IntMsgNum 0\n\n\
         00:02.0 PCI bridge [0604]: Port [8086:2030]\n\tControl: I/O- Mem+\n\
         \tBus: primary=00, secondary=02, subordinate=02, sec-latency=0\n\
         \tCapabilities: [40] Express (v2) Root Port (Slot+), IntMsgNum 0\n\n\
         01:00.0 Non-Volatile memory controller [0108]: Disk [144d:a808]\n\tControl: I/O- Mem+\n\
         \tRegion 0: Memory at fe000000 (64-bit, non-prefetchable) [size=16K]\n\
         \tCapabilities: [40] Express (v2) Endpoint, IntMsgNum 0\n\tKernel driver in use: nvme\n\n\
         02:00.0 3D controller [0302]: Card [10de:20b0]\n\tControl: I/O- Mem+\n\
         \tRegion 0: Memory at 3800000000 (64-bit, prefetchable) [size=64G]\n\
         \tCapabilities: [40] Express (v2) Endpoint, IntMsgNum 0\n\tKernel driver in use: nvidia\n"
    );
    std::fs::write(&file, text).unwrap();
    file
}

#[test]
fn why_tells_a_pair_of_a_snapshot_in_25_lines_and_by_its_exit_status() {
    for (name, host, code, word) in [
        // On the kernel's list; nothing that is known stands against it.
        ("trusted", "8086:09a2", 0, "host-bridge-unproved"),
        ("refused", "8086:4660", 1, "processor-unknown"),
    ] {
        let file = snapshot(name, host);
        let arguments = [
            "why",
            "01:00.0",
            "0000:02:00.0",
            "--from",
            &file,
            "--kernel",
            "7.3",
        ];
        let output = peerbuf(&arguments);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.lines().count() < 25 && text.contains(word), "{text}");
        assert!(
            text.contains("unknown in lspci -vvv: ") && text.contains("facts-unknown"),
            "{text}"
        );
        let json = peerbuf(&[&arguments[..], &["--json"]].concat());
        let ways = &json_lines(&json)[0]["ways"];
        assert_eq!(ways[0]["client"], "0000:01:00.0", "{ways}");
        let reasons = ways[0]["reasons"].as_array().unwrap();
        assert!(
            reasons.iter().any(|reason| reason["code"] == word),
            "{ways}"
        );
        let doctor = peerbuf(&["doctor", "--from", &file, "--kernel", "7.3"]);
        assert_eq!(doctor.status.code(), Some(code), "{doctor:?}");
        let doctor = String::from_utf8(doctor.stdout).unwrap();
        assert!(!doctor.contains("best way that there is"), "{doctor}");
    }
}

#[test]
fn what_is_no_device_is_wrong_usage_and_what_is_no_peer_is_in_the_way() {
    let file = snapshot("names", "8086:4660");
    for usage in [
        &["why", "09:00.0", "0000:02:00.0", "--from", &file][..],
        &["why", "nonsense", "0000:02:00.0", "--from", &file],
        &["why", "/", "0000:02:00.0", "--from", &file],
        &[
            "why", "01:00.0", "02:00.0", "--from", &file, "--kernel", "new",
        ],
        &["why", "01:00.0"],
    ] {
        assert_eq!(peerbuf(usage).status.code(), Some(2), "{usage:?}");
    }
    let output = peerbuf(&["topo", "--from", "/nonexistent"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("/nonexistent: ")
    );
}

#[test]
fn topo_draws_saves_and_reads_what_it_saved() {
    let file = snapshot("drawn", "8086:09a2");
    let (saved, svg) = (
        format!("{}/saved.json", directory()),
        format!("{}/drawn.svg", directory()),
    );
    let output = peerbuf(&["topo", "--from", &file, "--save", &saved, "--svg", &svg]);
    assert!(output.status.success(), "{output:?}");
    let text = |from: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peerbuf"));
        let output = command
            .args(["topo", "--from", from])
            .env("COLUMNS", "80")
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let drawn = text(&file);
    assert_eq!(text(&saved), drawn);
    for words in [
        "pci0000:00 (8086:09a2)",
        "[NVMe0] 0000:01:00.0",
        "[GPU0] 0000:02:00.0",
        "PHB",
    ] {
        assert!(drawn.contains(words), "no {words:?} in\n{drawn}");
    }
    assert!(
        drawn.lines().all(|line| line.chars().count() <= 80),
        "{drawn}"
    );
    let picture = std::fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
    assert!(
        picture.contains("NVMe0  0000:01:00.0") && picture.contains(">PHB<"),
        "{picture}"
    );
    // Nothing is cut off at the right or below: a letter of this size is less than seven units wide.
    let parsed = roxmltree::Document::parse(&picture).unwrap();
    let number = |node: roxmltree::Node<'_, '_>, name| -> f64 {
        node.attribute(name).unwrap().parse().unwrap()
    };
    let (width, height) = (
        number(parsed.root_element(), "width"),
        number(parsed.root_element(), "height"),
    );
    let texts = parsed
        .descendants()
        .filter(|node| node.has_tag_name("text"));
    for text in texts.clone() {
        let letters = text.text().unwrap().chars().count() as f64 * 7.0;
        let right = match text.attribute("text-anchor") {
            Some("middle") => letters / 2.0,
            _ => letters,
        };
        assert!(
            number(text, "x") + right <= width && number(text, "y") <= height,
            "{text:?} is outside"
        );
    }
    assert!(texts.count() > 10);
    let json = peerbuf(&["topo", "--from", &file, "--json"]);
    let json = &json_lines(&json)[0];
    let card = &json["devices"][1];
    assert_eq!(card["bars"][0]["size"], 64_u64 << 30, "{card}");
    assert_eq!(card["driver"]["bound"], "nvidia", "{card}");
    for (of, fact) in [
        (card, "acs"),
        (card, "link"),
        (card, "iommu"),
        (card, "numa_node"),
        (card, "dma_mask_bits"),
        (&json["bridges"][1], "acs"),
    ] {
        assert!(of.get(fact).is_some(), "no {fact} in {of}");
    }
    let pairs = &json["pairs"];
    assert_eq!(
        (&pairs[0]["kernel"], &pairs[0]["near"]),
        (&"?".into(), &"PHB".into()),
        "{pairs}"
    );
}

#[test]
fn doctor_and_ls_work_on_any_machine() {
    for command in ["doctor", "ls"] {
        let output = peerbuf(&[command]);
        // This machine may have something in the way.
        assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
        assert!(!output.stdout.is_empty());
        let json = json_lines(&peerbuf(&[command, "--json"]));
        let list = if command == "doctor" {
            "findings"
        } else {
            "buffers"
        };
        assert!(json[0][list].is_array(), "{json:?}");
    }
}

/// A picture of `topo --svg`, rendered.
struct Rendered {
    width: usize,
    height: usize,
    /// Bytes of each pixel: red, green, blue, and alpha where there is some.
    parts: usize,
    pixels: Vec<u8>,
}

fn render(svg: &str) -> Rendered {
    let output = Command::new("rsvg-convert").arg(svg).output();
    let output = output.expect("rsvg-convert (librsvg2-bin) is what this test is run for");
    assert!(output.status.success(), "{svg}: {output:?}");
    let png = output.stdout;
    let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap()) as usize;
    // Eight bits of red, green and blue, and perhaps of alpha; not interlaced.
    let parts = match png[24..29] {
        [8, 2, 0, 0, 0] => 3,
        [8, 6, 0, 0, 0] => 4,
        _ => panic!("{svg}: {:?}", &png[24..29]),
    };
    let (width, height) = (number(16), number(20));
    let (mut at, mut packed) = (8, Vec::new());
    while at < png.len() {
        let length = number(at);
        if &png[at + 4..at + 8] == b"IDAT" {
            packed.extend(&png[at + 8..at + 8 + length]);
        }
        at += length + 12;
    }
    let rows = miniz_oxide::inflate::decompress_to_vec_zlib(&packed).unwrap();
    let mut pixels: Vec<u8> = Vec::with_capacity(width * height * parts);
    for row in rows.chunks_exact(width * parts + 1) {
        let start = pixels.len();
        for (place, byte) in row[1..].iter().enumerate() {
            let byte_at = |at: Option<usize>| at.map_or(0, |at| pixels[at]);
            let left = byte_at((place >= parts).then(|| start + place - parts));
            let above = byte_at((start + place).checked_sub(width * parts));
            let corner = byte_at(
                (place >= parts)
                    .then(|| (start + place - parts).checked_sub(width * parts))
                    .flatten(),
            );
            let guess = match row[0] {
                0 => 0,
                1 => left,
                2 => above,
                3 => u8::midpoint(left, above),
                4 => {
                    let (a, b, c) = (i16::from(left), i16::from(above), i16::from(corner));
                    let (to_a, to_b, to_c) = ((b - c).abs(), (a - c).abs(), (a + b - 2 * c).abs());
                    match (to_a <= to_b && to_a <= to_c, to_b <= to_c) {
                        (true, _) => left,
                        (false, true) => above,
                        _ => corner,
                    }
                }
                other => panic!("{svg}: PNG has no filter {other}"),
            };
            pixels.push(byte.wrapping_add(guess));
        }
    }
    Rendered {
        width,
        height,
        parts,
        pixels,
    }
}

/// `cargo test -p peerbuf-cli --test command -- --ignored pictures`; further machines with PEERBUF_TOPOLOGIES=FOLDER.
#[test]
#[ignore = "needs rsvg-convert (librsvg2-bin)"]
fn pictures_that_are_rendered_have_marks_in_each_line_and_colours_in_the_matrix() {
    let mut files = vec![
        snapshot("rendered", "8086:09a2"),
        snapshot("rendered-refused", "8086:4660"),
    ];
    if let Some(folder) = std::env::var_os("PEERBUF_TOPOLOGIES") {
        let entries = std::fs::read_dir(folder).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        files.extend(paths.map(|path| path.to_str().unwrap().to_owned()));
    }
    let svg = format!("{}/rendered.svg", directory());
    for file in &files {
        let output = peerbuf(&["topo", "--from", file, "--svg", &svg]);
        assert!(output.status.success(), "{file}: {output:?}");
        let text = std::fs::read_to_string(&svg).unwrap();
        let Rendered {
            width,
            height,
            parts,
            pixels,
        } = render(&svg);
        let parsed = roxmltree::Document::parse(&text).unwrap();
        let pixel = |x: usize, y: usize| &pixels[(y * width + x) * parts..][..3];
        let number = |node: &roxmltree::Node<'_, '_>, name: &str| -> usize {
            node.attribute(name).unwrap().parse().unwrap()
        };
        // Something dark stands where each text is.
        let texts = parsed
            .descendants()
            .filter(|node| node.has_tag_name("text"));
        for node in texts.clone() {
            let (x, y) = (number(&node, "x"), number(&node, "y"));
            let xs = x.saturating_sub(10)..(x + 14).min(width);
            let mut near =
                xs.flat_map(|x| (y.saturating_sub(10)..y.min(height)).map(move |y| (x, y)));
            let is_dark = |(x, y): (usize, usize)| pixel(x, y).iter().all(|part| *part < 0xa0);
            assert!(
                near.any(is_dark),
                "{file}: {:?} is not to be seen",
                node.text()
            );
        }
        assert!(texts.count() > 3, "{file}");
        // And each coloured field has its colour, beside its words.
        for node in parsed
            .descendants()
            .filter(|node| node.has_tag_name("rect"))
        {
            let Some(x) = node.attribute("x") else {
                continue;
            };
            let (x, y): (usize, usize) = (x.parse().unwrap(), number(&node, "y"));
            let fill = &node.attribute("fill").unwrap()[1..];
            let fill: Vec<u8> = [0, 2, 4]
                .map(|at| u8::from_str_radix(&fill[at..at + 2], 16).unwrap())
                .into();
            // Above the words, and inside of the round corners.
            assert_eq!(pixel(x + 4, y + 2), &fill[..], "{file}: at {x}, {y}");
        }
    }
    println!("{} pictures", files.len());
}

#[test]
fn bash_completes_each_command_that_help_names_and_no_other() {
    let help = peerbuf(&["--help"]);
    let help = String::from_utf8(help.stdout).unwrap();
    let listed = help.split("Commands:\n").nth(1).unwrap();
    let listed = listed.split("\n\n").next().unwrap();
    let mut commands: Vec<&str> = listed
        .lines()
        .map(|line| line.split_whitespace().next().unwrap())
        .collect();
    commands.sort_unstable();
    assert!(commands.contains(&"doctor"), "{help}");
    let script = peerbuf(&["completions", "bash"]);
    assert!(script.status.success(), "{script:?}");
    let script = String::from_utf8(script.stdout).unwrap();
    // As the shell calls what `complete -F` was given, with the cursor behind "peerbuf ".
    let ask = "\nCOMP_WORDS=(peerbuf '') COMP_CWORD=1; _peerbuf peerbuf '' peerbuf; printf '%s\\n' \"${COMPREPLY[@]}\"";
    let answer = Command::new("bash").args(["-c", &(script + ask)]).output();
    let answer = match answer {
        Ok(answer) => String::from_utf8(answer.stdout).unwrap(),
        Err(error) => {
            eprintln!(
                "bash_completes_each_command_that_help_names_and_no_other: not run: bash: {error}"
            );
            return;
        }
    };
    let mut offered: Vec<&str> = answer
        .lines()
        .filter(|word| !word.starts_with('-'))
        .collect();
    offered.sort_unstable();
    assert_eq!(offered, commands);
    for shell in ["zsh", "fish"] {
        let script = String::from_utf8(peerbuf(&["completions", shell]).stdout).unwrap();
        for command in &commands {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
}

#[test]
fn there_is_a_manual_page_for_each_command() {
    let pages = std::path::Path::new(directory()).join("pages");
    std::fs::create_dir_all(&pages).unwrap();
    let output = peerbuf(&["manual", pages.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    for page in ["peerbuf", "peerbuf-doctor", "peerbuf-rdma-serve"] {
        let text = std::fs::read_to_string(pages.join(format!("{page}.1"))).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "{text}");
    }
    assert!(!pages.join("peerbuf-demo-worker.1").exists());
    let output = peerbuf(&["manual", "/no/such/directory"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("/no/such/directory"), "{said}");
}

#[test]
fn the_version_names_library_interface_kernel_and_module() {
    let text = String::from_utf8(peerbuf(&["--version"]).stdout).unwrap();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(lines[0], format!("peerbuf {version}"));
    assert_eq!(lines[1], format!("library: {version}"));
    assert!(lines[2].starts_with("features needed of peerbuf.ko: "));
    assert_eq!(lines[3], format!("kernel: {}", release.trim()));
    let loaded = std::path::Path::new("/sys/module/peerbuf").exists();
    assert_eq!(lines[4] == "peerbuf.ko: not loaded", !loaded, "{text}");
    let short = String::from_utf8(peerbuf(&["-V"]).stdout).unwrap();
    assert_eq!(short, format!("peerbuf {version}\n"));
}
