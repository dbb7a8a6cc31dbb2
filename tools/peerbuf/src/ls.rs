//! `peerbuf ls`: the dma-bufs of this machine, as far as the caller may see them.
//!
//! `/proc` lists the descriptors and mappings of each process that the caller may inspect.
//! debugfs lists buffers that only the kernel holds (such as a display's), for root. The placement is known for
//! exporters of system memory, and for peerbuf.ko's buffers if the caller may open their device's node.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;

use crate::held::{self, Place, is_dmabuf, plain};
use crate::table::{self, Table};
use crate::{Failure, say, size};

/// Arguments of `peerbuf ls`.
#[derive(clap::Args)]
pub struct Arguments {
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Buffer {
    inode: u64,
    size: Option<u64>,
    exporter: Option<String>,
    name: Option<String>,
    /// Where its bytes are; unknown of most drivers.
    placement: Option<Place>,
    /// The PCI function that has it.
    device: Option<String>,
    holders: Vec<Holder>,
    /// The attached devices; `None` unless the caller is root.
    importers: Option<Vec<String>>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Holder {
    pid: u32,
    command: String,
    descriptors: usize,
    mappings: usize,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let (mut buffers, hidden) = by_process(Path::new("/proc"));
    let debugfs = fs::read_to_string("/sys/kernel/debug/dma_buf/bufinfo");
    if let Ok(text) = &debugfs {
        add_importers(text, &mut buffers);
    }
    let mut left_out = Vec::new();
    if hidden > 0 {
        left_out.push(format!("{hidden} processes of other users (root may look)"));
    }
    if let Err(error) = &debugfs {
        left_out.push(format!(
            "importers (/sys/kernel/debug/dma_buf/bufinfo: {error})"
        ));
    }
    let buffers: Vec<Buffer> = buffers.into_values().collect();
    if arguments.json {
        say::answer(json!({ "buffers": buffers, "left_out": left_out }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let width = table::width();
    let mut text = String::new();
    if buffers.is_empty() {
        text += "no dma-buf is held by a process that can be looked at\n";
    } else {
        let mut table = Table::new([
            "inode",
            "size",
            "exporter",
            "name",
            "placement",
            "held by",
            "imported by",
        ]);
        for buffer in &buffers {
            let holder = |holder: &Holder| {
                let count = |number, what| match number {
                    0 => String::new(),
                    1 => format!(", 1 {what}"),
                    more => format!(", {more} {what}s"),
                };
                let (fds, maps) = (
                    count(holder.descriptors, "fd"),
                    count(holder.mappings, "mapping"),
                );
                format!("{} {}{fds}{maps}", holder.pid, holder.command)
            };
            let holders: Vec<String> = buffer.holders.iter().map(holder).collect();
            table.row([
                buffer.inode.to_string(),
                buffer.size.map_or("?".into(), size::show),
                buffer.exporter.clone().unwrap_or_else(|| "?".into()),
                buffer.name.clone().unwrap_or_default(),
                place(buffer),
                holders.join("\n"),
                buffer
                    .importers
                    .as_ref()
                    .map_or("?".into(), |importers| importers.join("\n")),
            ]);
        }
        text += &format!("{}\n", table.show(width));
    }
    for what in &left_out {
        text += &table::paragraph(&format!("left out: {what}"), width);
    }
    say::answer(text.trim_end())?;
    Ok(ExitCode::SUCCESS)
}

/// `device 0000:03:00.0`, `system`, or `?`.
fn place(buffer: &Buffer) -> String {
    let place = buffer.placement.map(Place::name);
    let parts: Vec<&str> = place.into_iter().chain(buffer.device.as_deref()).collect();
    match parts.is_empty() {
        true => "?".into(),
        false => parts.join("\n"),
    }
}

/// The buffers by inode, and the number of processes that could not be inspected.
fn by_process(proc: &Path) -> (BTreeMap<u64, Buffer>, usize) {
    let mut buffers: BTreeMap<u64, Buffer> = BTreeMap::new();
    let mut hidden = 0;
    for entry in fs::read_dir(proc).into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let directory = entry.path();
        let Ok(descriptors) = fs::read_dir(directory.join("fd")) else {
            // A process that ended meanwhile does not count as hidden.
            hidden += usize::from(directory.exists());
            continue;
        };
        // Number of descriptors and mappings of each buffer in this process.
        let mut held: BTreeMap<u64, (usize, usize)> = BTreeMap::new();
        for descriptor in descriptors.flatten() {
            if !is_dmabuf(&fs::read_link(descriptor.path()).unwrap_or_default()) {
                continue;
            }
            let Ok(metadata) = fs::metadata(descriptor.path()) else {
                continue;
            };
            let buffer = buffers.entry(metadata.ino()).or_default();
            let info = directory.join("fdinfo").join(descriptor.file_name());
            let is_new = buffer.exporter.is_none();
            describe(&fs::read_to_string(info).unwrap_or_default(), buffer);
            if let (true, Some(exporter)) = (is_new, &buffer.exporter) {
                let known = held::known(&descriptor.path(), exporter);
                buffer.placement = known.place;
                buffer.device = known.device.map(|device| device.to_string());
            }
            held.entry(metadata.ino()).or_default().0 += 1;
        }
        for (inode, bytes) in
            mappings(&fs::read_to_string(directory.join("maps")).unwrap_or_default())
        {
            let buffer = buffers.entry(inode).or_default();
            // A mapping may cover only part of the buffer, so its length is a lower bound of
            // the size.
            buffer.size = buffer.size.max(Some(bytes));
            held.entry(inode).or_default().1 += 1;
        }
        let command = fs::read_to_string(directory.join("comm")).unwrap_or_default();
        for (inode, (descriptors, mappings)) in held {
            let buffer = buffers.entry(inode).or_default();
            buffer.inode = inode;
            buffer.holders.push(Holder {
                pid,
                command: plain(&command),
                descriptors,
                mappings,
            });
        }
    }
    (buffers, hidden)
}

/// Parses `fdinfo`: a line each for `size`, `exp_name` and, if present, `name`.
fn describe(fdinfo: &str, buffer: &mut Buffer) {
    for (key, value) in fdinfo.lines().filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        match key {
            "size" => buffer.size = value.parse().ok(),
            "exp_name" => buffer.exporter = Some(plain(value)),
            "name" => buffer.name = Some(plain(value)),
            _ => {}
        }
    }
}

/// Inode and length in bytes of each mapping of a dma-buf.
fn mappings(maps: &str) -> Vec<(u64, u64)> {
    let mapping = |line: &str| {
        let mut fields = line.split_whitespace();
        let (begin, end) = fields.next()?.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let bytes = number(end)?.checked_sub(number(begin)?)?;
        let inode = fields.nth(3)?.parse().ok()?;
        fields
            .next()?
            .starts_with("/dmabuf:")
            .then_some((inode, bytes))
    };
    maps.lines().filter_map(mapping).collect()
}

/// Parses `bufinfo`: a line for each buffer (size, flags, mode, count, exporter, inode, name),
/// followed by its devices.
fn add_importers(bufinfo: &str, buffers: &mut BTreeMap<u64, Buffer>) {
    let mut current: Option<u64> = None;
    for line in bufinfo.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        if let [size, _, _, _, exporter, inode, rest @ ..] = fields.as_slice()
            && let (Ok(size), Ok(inode)) = (size.trim().parse(), inode.trim().parse())
        {
            let buffer = buffers.entry(inode).or_default();
            buffer.inode = inode;
            buffer.size = Some(size);
            buffer.exporter.get_or_insert_with(|| plain(exporter));
            buffer.importers = Some(Vec::new());
            if let Some(name) = rest
                .first()
                .map(|name| name.trim())
                .filter(|name| !name.is_empty() && *name != "<none>")
            {
                buffer.name.get_or_insert_with(|| plain(name));
            }
            current = Some(inode);
        } else if let Some(device) = line.strip_prefix('\t').map(str::trim)
            && let Some(importers) =
                current.and_then(|inode| buffers.get_mut(&inode)?.importers.as_mut())
        {
            // The heading and the total are not devices.
            let is_device =
                !device.is_empty() && !device.ends_with(':') && !device.starts_with("Total");
            importers.extend(is_device.then(|| plain(device)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_found_by_descriptors_mappings_and_in_debugfs() {
        let mut buffer = Buffer::default();
        describe(
            "pos:\t0\nsize:\t4096\ncount:\t2\nexp_name:\tudmabuf\nname:\tevil\x1b[31m\n",
            &mut buffer,
        );
        assert_eq!(
            (buffer.size, buffer.exporter.as_deref()),
            (Some(4096), Some("udmabuf"))
        );
        assert_eq!(buffer.name.as_deref(), Some("evil?[31m"));
        let maps = "7f00-7f01 rw-s 00000000 00:0c 7 /dmabuf:\n\
                    7f0000000000-7f0000002000 rw-s 00000000 00:0c 77 /dmabuf: weights\n\
                    7f0000000000-7f0000002000 rw-p 00000000 00:0c 78 /usr/lib/x\n";
        assert_eq!(mappings(maps), [(7, 1), (77, 8192)]);
        assert!(is_dmabuf(Path::new("/dmabuf:weights")) && !is_dmabuf(Path::new("/memfd:x")));
        // The format of drivers/dma-buf/dma-buf.c.
        let bufinfo = "\nDma-buf Objects:\nsize    \tflags   \tmode    \tcount   \texp_name\tino     \tname\n\
                       00004096\t00000002\t00080007\t00000002\tudmabuf\t00000077\tweights\n\
                       \tAttached Devices:\n\t0000:03:00.0\nTotal 1 devices attached\n\n\nTotal 1 objects, 4096 bytes\n";
        let mut buffers = BTreeMap::new();
        add_importers(bufinfo, &mut buffers);
        let found = &buffers[&77];
        assert_eq!(
            (found.inode, found.size, found.name.as_deref()),
            (77, Some(4096), Some("weights"))
        );
        assert_eq!(found.importers, Some(vec!["0000:03:00.0".to_owned()]));
        assert_eq!(buffers.len(), 1);
    }

    #[test]
    fn a_process_that_ends_meanwhile_is_not_counted_as_hidden() {
        let (buffers, _) = by_process(Path::new("/nonexistent"));
        assert!(buffers.is_empty());
    }
}
