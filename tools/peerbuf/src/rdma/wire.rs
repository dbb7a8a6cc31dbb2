//! The protocol of `peerbuf rdma` over TCP: JSON messages, each after its length (32 bits, big-endian).
//! Every field is checked before use.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use peerbuf_rdma::{Address, Remote};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Failure;

/// The longest message.
const LIMIT: u32 = 64 << 10;
/// The version of this protocol, in the first message of each end.
const VERSION: u32 = 2;

/// An end's registration of its buffer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// The card's name.
    pub card: String,
    /// The buffer's name.
    pub buffer: String,
    /// The kind of registration.
    pub registration: String,
    /// The errors of better kinds of registration.
    pub attempts: Vec<String>,
    /// The path between the buffer and the card.
    pub path: String,
}

impl Receipt {
    /// Adds the receipt of a later registration and keeps the earlier paths: a buffer that
    /// moves has several.
    pub fn follow(&mut self, later: Receipt) {
        let mut path = std::mem::take(&mut self.path);
        add(&mut path, &later.path);
        let mut registration = std::mem::take(&mut self.registration);
        add(&mut registration, &later.registration);
        *self = Receipt {
            path,
            registration,
            ..later
        };
    }

    /// Checks the texts, which come from the peer and are going to be printed.
    fn checked(self) -> Result<Receipt, Failure> {
        let Receipt {
            card,
            buffer,
            registration,
            attempts,
            path,
        } = &self;
        let texts = [card, buffer, registration, path];
        for text in texts.into_iter().chain(attempts) {
            plain(text)?;
        }
        Ok(self)
    }
}

/// The first message, of both ends.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    version: u32,
    /// The size of the buffer in bytes.
    size: u64,
}

impl Hello {
    pub fn new(size: u64) -> Hello {
        let version = VERSION;
        Hello { version, size }
    }

    /// The size of the peer's buffer in bytes, after a check of the message.
    pub fn open(self) -> Result<u64, Failure> {
        if self.version != VERSION {
            return Err(format!(
                "the peer speaks version {} of the protocol, this program {VERSION}",
                self.version
            )
            .into());
        }
        Ok(self.size)
    }
}

/// A client's request, after the first messages.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Request {
    /// The client wants to use the buffer. With an address, it makes a new connection to it and
    /// gives up the old one.
    Begin { connect: Option<[u8; 32]> },
    /// The client has written the first `length` bytes of the buffer, which belong at `at` in
    /// the file.
    Written { at: u64, length: u64 },
    /// The client is going to read this many bytes of the buffer.
    Read { at: u64, length: u64 },
    /// The transfer is complete.
    End,
}

/// The answer to a request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Response {
    /// The buffer stays in place until the next request other than `Read`, or until it has to
    /// move.
    Ready(Shown),
    /// The work is done, or can be done now.
    Done(Account),
    /// The buffer had to move before the bytes arrived, so the client must write them again.
    Again,
    /// The server refused, with this reason.
    Refused(String),
}

/// The present buffer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shown {
    /// The address of the new connection's end.
    connect: Option<[u8; 32]>,
    remote: [u8; 24],
    receipt: Receipt,
}

impl Shown {
    pub fn new(connect: Option<&Address>, remote: &Remote, receipt: Receipt) -> Shown {
        Shown {
            connect: connect.map(Address::to_bytes),
            remote: remote.to_bytes(),
            receipt,
        }
    }

    /// The contents, after a check.
    pub fn open(self) -> Result<(Option<Address>, Remote, Receipt), Failure> {
        let connect = self.connect.as_ref().map(Address::from_bytes).transpose()?;
        let remote = Remote::from_bytes(&self.remote)?;
        Ok((connect, remote, self.receipt.checked()?))
    }
}

/// The server's report: a checksum of the buffer, and counters.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    /// SHA-256 of the bytes in the buffer.
    pub checksum: [u8; 32],
    /// Number of bytes that the CPU copied between the card's bounce buffer and the buffer.
    pub copied: u64,
    /// Number of moves of the buffer since this client connected.
    pub moves: u64,
    /// For bytes written to a file: the path, and the number of bytes that went through system
    /// memory.
    pub file: Option<FileAccount>,
}

/// The account of one end's file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileAccount {
    pub path: String,
    pub host_bytes: u64,
}

/// Adds an item to a list, unless the list contains it.
pub fn add(list: &mut String, thing: &str) {
    if list.is_empty() {
        *list = thing.to_owned();
    } else if !list.split(", ").any(|known| known == thing) {
        list.push_str(", ");
        list.push_str(thing);
    }
}

/// Checks that a text of the peer has no control characters, which a terminal would obey.
pub fn plain(text: &str) -> Result<&str, Failure> {
    if text.chars().any(char::is_control) {
        return Err("malformed: control characters in a text".into());
    }
    Ok(text)
}

/// Sends one message.
pub fn send(stream: &mut TcpStream, message: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_vec(message)?;
    let length = u32::try_from(text.len()).ok().filter(|l| *l <= LIMIT);
    let length = length.ok_or("a message that is too long")?;
    stream.write_all(&length.to_be_bytes())?;
    stream.write_all(&text)?;
    Ok(())
}

/// Waits for one message; `None` if the peer closed the connection between two messages.
pub fn receive<T: DeserializeOwned>(stream: &mut TcpStream) -> Result<Option<T>, Failure> {
    let mut length = [0; 4];
    match stream.read(&mut length[..1]) {
        Ok(0) => return Ok(None),
        Ok(_) => stream.read_exact(&mut length[1..]).map_err(cut_off)?,
        Err(error) => return Err(cut_off(error)),
    }
    let length = u32::from_be_bytes(length);
    if length > LIMIT {
        return Err(format!("malformed: a message of {length} bytes, of at most {LIMIT}").into());
    }
    let mut text = vec![0; length as usize];
    stream.read_exact(&mut text).map_err(cut_off)?;
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| format!("malformed: {error}").into())
}

fn cut_off(error: std::io::Error) -> Failure {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            "timed out waiting for a message from the peer".into()
        }
        ErrorKind::UnexpectedEof => "the peer closed the connection in mid-message".into(),
        _ => format!("the connection: {error}").into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn streams() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (ours, listener.accept().unwrap().0)
    }

    #[test]
    fn messages_arrive_one_by_one_and_the_end_is_seen() {
        let (mut ours, mut theirs) = streams();
        send(&mut ours, &Request::Written { at: 1, length: 2 }).unwrap();
        send(&mut ours, &Request::End).unwrap();
        drop(ours);
        let mut next = || receive::<Request>(&mut theirs).unwrap();
        assert!(matches!(
            next(),
            Some(Request::Written { at: 1, length: 2 })
        ));
        assert!(matches!(next(), Some(Request::End)));
        assert!(next().is_none());
    }

    #[test]
    fn rubbish_is_refused() {
        for bytes in [
            &b"\xff\xff\xff\xff"[..],
            b"\0\x01\0\x01",
            b"\0\0\0\x02{}",
            b"\0\0\0\x05\"End",
            b"\0\0\0\x05nope!",
            b"\0\0\0\x24{\"Read\":{\"at\":0,\"length\":1,\"x\":true}}",
            b"\0\0\0\x1d{\"Read\":{\"at\":-1,\"length\":1}}",
        ] {
            let (mut ours, mut theirs) = streams();
            ours.write_all(bytes).unwrap();
            drop(ours);
            assert!(receive::<Request>(&mut theirs).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn a_greeting_of_another_version_and_a_forged_buffer_are_refused() {
        let hello = |version| Hello { version, size: 1 };
        assert_eq!(hello(VERSION).open().unwrap(), 1);
        assert!(hello(VERSION + 1).open().is_err());

        let receipt = Receipt {
            card: String::new(),
            buffer: String::new(),
            registration: String::new(),
            attempts: Vec::new(),
            path: String::new(),
        };
        let shown = |address, remote| Shown {
            connect: Some(address),
            remote,
            receipt: receipt.clone(),
        };
        let mut address = [7; 32];
        address[16] = 0; // numbers of 24 bits
        address[20] = 0;
        address[24] = 3;
        address[25..].fill(0);
        let mut remote = [0; 24];
        remote[15] = 1;
        assert!(shown(address, remote).open().is_ok());
        assert!(shown([0; 32], remote).open().is_err());
        let mut wraps = [0xff; 24];
        wraps[20..].fill(0);
        assert!(shown(address, wraps).open().is_err());
        let mut colourful = shown(address, remote);
        colourful.receipt.attempts = vec!["\x1b[31m".into()];
        assert!(colourful.open().is_err());
    }
}
