//! Runs commands one after the other in one guest; each is requested after the last one has ended.
//!
//! In the guest, `tests/lab/init/suite` reads the commands as lines of standard input, and marks the end of
//! each command's output. A [`Session`] writes the lines and splits the output at the marks; [`session`] also
//! makes the [`Streams`] that connect the guest to it.

use std::{
    ffi::OsString,
    io::{self, Read, Write},
    sync::mpsc::{Receiver, Sender, channel},
    time::Duration,
};

use crate::run::{Deadline, Streams};

/// A finished command.
pub struct Done {
    /// Its complete output.
    pub output: String,
    /// Its exit status.
    pub status: i32,
}

/// The host's end of a session.
pub struct Session {
    ask: Sender<String>,
    heard: Receiver<Said>,
    deadline: Deadline,
}

/// A session, and the streams for the guest's [`run`](crate::run::run). The guest ends after the session is
/// dropped and its last command has ended. Each command has the full time of the guest's `deadline`.
pub fn session(deadline: Deadline) -> (Session, Streams) {
    let (ask, asked) = channel();
    let (said, heard) = channel();
    let outputs = |said| {
        Box::new(Outputs {
            said,
            text: Vec::new(),
        })
    };
    let streams = Streams {
        stdin: Some(Box::new(Lines {
            more: asked,
            line: io::Cursor::default(),
        })),
        stdout: outputs(said.clone()),
        stderr: outputs(said),
    };
    let session = Session {
        ask,
        heard,
        deadline,
    };
    (session, streams)
}

/// The command that a guest with a session runs.
pub fn script() -> Vec<OsString> {
    ["/bin/sh", "/opt/peerbuf/init/suite"]
        .map(OsString::from)
        .into()
}

impl Session {
    /// The guest's CPU time on the host so far.
    pub fn ran(&self) -> Duration {
        self.deadline.ran()
    }

    /// Runs a command: words without quotes, as the guest's script splits them.
    ///
    /// # Errors If the guest ended before the command; contains the output so far.
    pub fn run(&mut self, command: &str) -> Result<Done, String> {
        self.deadline.again();
        // If the guest is gone, the answer will be missing, too.
        let _ = self.ask.send(format!("{command}\n"));
        let mut rest = String::new();
        loop {
            match self.heard.recv() {
                Ok(Said::All(done)) => return Ok(done),
                Ok(Said::Rest(text)) => rest += &text,
                Err(_) => return Err(rest),
            }
        }
    }
}

/// Lines from a channel as a stream, which ends with the sender.
struct Lines {
    more: Receiver<String>,
    line: io::Cursor<String>,
}

impl Read for Lines {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.line.read(buffer)?;
        if n > 0 {
            return Ok(n);
        }
        match self.more.recv() {
            Ok(line) => {
                self.line = io::Cursor::new(line);
                self.line.read(buffer)
            }
            Err(_) => Ok(0),
        }
    }
}

/// Output of the script in the guest.
enum Said {
    /// The complete output of a command.
    All(Done),
    /// The rest when the guest ended.
    Rest(String),
}

/// Splits a stream at the ends of commands.
struct Outputs {
    said: Sender<Said>,
    text: Vec<u8>,
}

/// The start of the line that ends a command's output; the status follows.
const ENDED: &[u8] = b"\n\x1e ended ";

impl Write for Outputs {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(bytes);
        while let Some(at) = find(&self.text, ENDED) {
            let after = at + ENDED.len();
            let Some(end) = find(&self.text[after..], b"\n") else {
                break;
            };
            let output = String::from_utf8_lossy(&self.text[..at]).into_owned() + "\n";
            let status = String::from_utf8_lossy(&self.text[after..after + end]);
            // A status that is not a number counts as a failure.
            let status = status.trim().parse().unwrap_or(i32::MAX);
            self.text.drain(..=after + end);
            // The receiver is gone if the session was dropped.
            let _ = self.said.send(Said::All(Done { output, status }));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Outputs {
    fn drop(&mut self) {
        let rest = String::from_utf8_lossy(&self.text).into_owned();
        let _ = self.said.send(Said::Rest(rest));
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|w| w == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_stream_is_cut_at_the_ends_of_commands() {
        let (said, heard) = channel();
        let mut outputs = Outputs {
            said,
            text: Vec::new(),
        };
        for piece in ["one\n", "\n\x1e end", "ed 0\ntwo\n\n\x1e ended 101\nthr"] {
            outputs.write_all(piece.as_bytes()).unwrap();
        }
        drop(outputs);
        let all: Vec<_> = heard
            .iter()
            .map(|said| match said {
                Said::All(done) => format!("{} {}", done.status, done.output),
                Said::Rest(text) => format!("rest: {text}"),
            })
            .collect();
        assert_eq!(all, ["0 one\n\n", "101 two\n\n", "rest: thr"]);
    }

    #[test]
    fn a_guest_that_ends_in_a_command_leaves_what_it_printed() {
        let (mut session, streams) = session(Deadline::default());
        let guest = std::thread::spawn(move || {
            let Streams {
                stdin,
                mut stdout,
                stderr,
            } = streams;
            let mut stdin = io::BufReader::new(stdin.unwrap());
            let mut line = String::new();
            io::BufRead::read_line(&mut stdin, &mut line).unwrap();
            assert_eq!(line, "one word\n");
            stdout.write_all(b"out\n\n\x1e ended 3\n").unwrap();
            line.clear();
            io::BufRead::read_line(&mut stdin, &mut line).unwrap();
            stdout.write_all(b"half").unwrap();
            drop((stdout, stderr));
        });
        let done = session.run("one word").unwrap();
        assert_eq!((done.output.as_str(), done.status), ("out\n\n", 3));
        assert_eq!(session.run("another").err().unwrap(), "half");
        guest.join().unwrap();
    }
}
