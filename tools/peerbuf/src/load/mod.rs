//! `peerbuf load`: loads the tensors of a model file into one buffer, and lends the buffer.

mod gguf;
mod safetensors;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use peerbuf::buffer::Buffer;
use peerbuf::export::memfd;
use peerbuf::import::file::FileImporter;
use peerbuf::share::{Copied, Publisher};
use peerbuf::transfer::Piece;
use serde::Serialize;

use crate::copy::place::Place;
use crate::copy::{Bar, Leg};
use crate::{Failure, say, size};

/// Arguments of `peerbuf load`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// The model, a safetensors or GGUF file
    model: PathBuf,

    /// The memory that it goes to, a place as `peerbuf copy` has them
    #[arg(long, value_name = "PLACE", default_value = "udmabuf:")]
    to: Place,

    /// Lend the buffer to processes that connect to this socket, until Ctrl-C
    #[arg(long, value_name = "SOCKET")]
    share: Option<PathBuf>,

    /// How many requests are in flight
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    queue: Option<u32>,

    /// Compare every tensor in the buffer with the file
    #[arg(long)]
    check: bool,

    /// Give the tensors' places and the receipt as a JSON object
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
The buffer has the tensors in the file's order. Each has the same offset within a page as in the file, so that the
disk's DMA can put it there. --share lends the buffer as `model`, and a buffer of JSON text as `model.json`: each
tensor's name, type, shape, offset and length. The innermost dimension of a shape comes last; the type is the one
that the file's format names.

  peerbuf load model.safetensors --to bar:0000:03:00.0/2 --share /run/model
  peerbuf load model.gguf --to heap:system --check";

/// The loaded model, and the place of each tensor.
#[derive(Serialize)]
struct Loaded {
    model: String,
    buffer: String,
    /// From before the file was opened to the last byte.
    seconds: f64,
    /// The result of comparing every tensor with the file; `null` without `--check`.
    checked: Option<bool>,
    receipt: Leg,
    tensors: Vec<Tensor>,
}

/// One tensor, for programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tensor {
    pub name: String,
    /// The format's own name of the type.
    pub dtype: String,
    /// The shape, innermost dimension last, in both formats.
    pub shape: Vec<u64>,
    /// Offset in bytes.
    pub offset: u64,
    pub length: u64,
}

/// The tensors of a model in the order of their bytes, with their offsets in the file.
fn tensors(file: &File) -> Result<Vec<Tensor>, String> {
    let mut magic = [0; gguf::MAGIC.len()];
    match file.read_exact_at(&mut magic, 0) {
        // As the header length of a safetensors file, the magic number would be too large.
        Ok(()) if magic == *gguf::MAGIC => {
            let size = file.metadata().map_err(|error| error.to_string())?.len();
            gguf::tensors(file, size)
        }
        _ => safetensors::tensors(file),
    }
}

/// Loads the model, and lends the buffer.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let begun = Instant::now();
    let model = arguments.model.display().to_string();
    let opened = File::open(&arguments.model).map_err(|error| format!("{model}: {error}"))?;
    let in_file = tensors(&opened).map_err(|why| format!("{model}: {why}"))?;
    let begin = in_file.first().map_or(0, |tensor| tensor.offset);
    let end = in_file
        .last()
        .map_or(0, |tensor| tensor.offset + tensor.length);
    let length: u64 = in_file.iter().map(|tensor| tensor.length).sum();
    // A page of the buffer begins where a page of the file begins.
    let lead = begin % rustix::param::page_size() as u64;
    let buffer = arguments.to.memory(Some(lead + end - begin))?;
    let mut file = FileImporter::from_fd(opened.try_clone()?.into(), model.clone())?;
    if let Some(depth) = arguments.queue {
        file = file.with_depth(depth);
    }
    let place = |tensor: &Tensor| tensor.offset - begin + lead;
    let pieces: Vec<Piece> = in_file
        .iter()
        .map(|tensor| Piece {
            file_offset: tensor.offset,
            offset: place(tensor),
            length: tensor.length,
        })
        .collect();
    let bar = Bar::start(Some(length));
    let mut attachment = file.attach(&buffer.whole())?.watched_by(bar.watch());
    let receipt = attachment.read_many(&pieces)?;
    let seconds = begun.elapsed().as_secs_f64();
    drop((bar, attachment));
    let checked = match arguments.check {
        true => Some(is_there(&file, &buffer, &pieces)?),
        false => None,
    };
    let tensors = in_file.iter().map(|tensor| Tensor {
        offset: place(tensor),
        ..tensor.clone()
    });
    let loaded = Loaded {
        model,
        buffer: buffer.name().into(),
        seconds,
        checked,
        receipt: Leg::new(
            &arguments.model.display().to_string(),
            buffer.name(),
            &receipt,
        ),
        tensors: tensors.collect(),
    };
    match arguments.json {
        true => say::answer(serde_json::to_string(&loaded)?)?,
        false => say::answer(loaded.text(length))?,
    }
    if checked == Some(false) {
        return Err(format!(
            "{} does not have the bytes of {}",
            loaded.buffer, loaded.model
        )
        .into());
    }
    if let Some(socket) = &arguments.share {
        lend(socket, buffer, &loaded.tensors, &arguments.to)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// True if the buffer has the bytes of the file.
fn is_there(file: &FileImporter, buffer: &Buffer, pieces: &[Piece]) -> Result<bool, Failure> {
    for piece in pieces {
        if piece.length == 0 {
            continue;
        }
        let memory = memfd::export("memory", piece.length)?;
        let again = Piece {
            offset: 0,
            ..*piece
        };
        file.attach(&memory.whole())?.read_many(&[again])?;
        let in_buffer = buffer.range(piece.offset, piece.length)?.to_vec()?;
        if in_buffer != memory.whole().to_vec()? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Lends the buffer and the list of its tensors until the process ends.
fn lend(
    socket: &PathBuf,
    buffer: Buffer,
    tensors: &[Tensor],
    place: &Place,
) -> Result<(), Failure> {
    let index = serde_json::to_vec(tensors)?;
    let list = memfd::export("model.json", index.len().max(1) as u64)?;
    list.range(0, index.len() as u64)?.write_bytes(&index)?;
    let mut publisher = Publisher::bind(socket)?;
    let again = |first: Buffer, place: Place| {
        let size = first.size();
        let mut first = Some(first);
        // If the publisher moves the buffer, the next generation has the same kind.
        move |_: &_| match first.take() {
            Some(buffer) => Ok(buffer),
            None => match place.memory(Some(size)) {
                Ok(buffer) => Ok(buffer),
                Err(_) => memfd::export("model", size),
            },
        }
    };
    publisher.publish("model", Copied::new(again(buffer, place.clone()))?)?;
    publisher.publish("model.json", Copied::new(again(list, Place::Memfd))?)?;
    say::answer(format_args!("lent at {}, until Ctrl-C", socket.display()))?;
    loop {
        publisher.serve_for(Duration::from_secs(3600))?;
    }
}

impl Loaded {
    fn text(&self, length: u64) -> String {
        let rate = length as f64 / self.seconds.max(1e-9) / 1e6;
        let mut text = format!(
            "{} tensors, {} from {} to {} in {:.3} s, {rate:.0} MB/s\n{}",
            self.tensors.len(),
            size::show(length),
            self.model,
            self.buffer,
            self.seconds,
            self.receipt.text(),
        );
        match self.checked {
            Some(true) => text += "\nchecked: every byte is there",
            Some(false) => text += "\nchecked: the bytes differ",
            None => {}
        }
        text
    }
}
