//! What the two ends of `peerbuf rdma` tell each other over TCP: JSON, with the length in front
//! (32 bits, big-endian). Nothing of it is believed before it was checked.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use peerbuf::import::rdma::{Address, Remote};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Failure;

/// The longest message.
const LIMIT: u32 = 64 << 10;
/// Of this protocol; the first thing that either end says.
const VERSION: u32 = 1;

/// How one end's card has its buffer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// The card's name.
    pub card: String,
    /// The buffer's name.
    pub buffer: String,
    /// How the card was given the buffer.
    pub registration: String,
    /// What each better way failed with.
    pub attempts: Vec<String>,
    /// The path between the buffer and the card.
    pub path: String,
}

/// One end of a connection.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    version: u32,
    address: [u8; 32],
    /// The buffer, of the end that shows one.
    remote: Option<[u8; 24]>,
    /// The receipt of the end that speaks.
    pub receipt: Receipt,
}

impl Hello {
    pub fn new(address: &Address, remote: Option<&Remote>, receipt: Receipt) -> Hello {
        Hello {
            version: VERSION,
            address: address.to_bytes(),
            remote: remote.map(Remote::to_bytes),
            receipt,
        }
    }

    /// What it says, checked.
    pub fn open(self) -> Result<(Address, Option<Remote>, Receipt), Failure> {
        if self.version != VERSION {
            return Err(format!(
                "the other end speaks version {} of the protocol, this one {VERSION}",
                self.version
            )
            .into());
        }
        let Receipt {
            card,
            buffer,
            registration,
            attempts,
            path,
        } = &self.receipt;
        for text in [card, buffer, registration, path]
            .into_iter()
            .chain(attempts)
        {
            plain(text)?;
        }
        let remote = self.remote.as_ref().map(Remote::from_bytes).transpose()?;
        Ok((Address::from_bytes(&self.address)?, remote, self.receipt))
    }
}

/// What a client asks for, after the first messages.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Request {
    /// It has written the first `length` bytes of the buffer; they belong at `at` in the file.
    Written { at: u64, length: u64 },
    /// It is going to read so many bytes of the buffer.
    Read { at: u64, length: u64 },
    /// All was moved.
    End,
}

/// What it is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Response {
    /// Done, or can be done now.
    Done(Account),
    /// Not done.
    Refused(String),
}

/// What the serving end has seen and done.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    /// SHA-256 of the bytes in the buffer.
    pub checksum: [u8; 32],
    /// Bytes that the processor copied between the card's memory and the buffer.
    pub copied: u64,
    /// Of the bytes written to a file: the path, and how many were in system memory.
    pub file: Option<FileAccount>,
}

/// One end's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileAccount {
    pub path: String,
    pub host_bytes: u64,
}

/// Text of the other end's that is going to be printed, unless a terminal would obey it.
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

/// Waits for one message; `None` when the other end has closed the connection between two.
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
            "the other end said nothing for too long".into()
        }
        ErrorKind::UnexpectedEof => "the other end closed the connection in mid-message".into(),
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
    fn a_greeting_of_another_version_or_with_a_forged_address_is_refused() {
        let receipt = Receipt {
            card: String::new(),
            buffer: String::new(),
            registration: String::new(),
            attempts: Vec::new(),
            path: String::new(),
        };
        let hello = |version, address| Hello {
            version,
            address,
            remote: None,
            receipt: receipt.clone(),
        };
        let mut address = [7; 32];
        address[16] = 0; // numbers of 24 bits
        address[20] = 0;
        address[24] = 3;
        address[25..].fill(0);
        assert!(hello(VERSION, address).open().is_ok());
        assert!(hello(VERSION + 1, address).open().is_err());
        assert!(hello(VERSION, [0; 32]).open().is_err());
        let mut colourful = hello(VERSION, address);
        colourful.receipt.attempts = vec!["\x1b[31m".into()];
        assert!(colourful.open().is_err());
    }
}
