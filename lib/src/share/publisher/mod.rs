//! The side that owns buffers: it offers them, takes them back and moves them.
//!
//! The publisher works only inside calls of [`Publisher`], in the caller's thread. Each
//! subscriber's state contains its pending messages. [`Publisher::pump`] sends them as far as
//! the socket has room, so that a subscriber that does not read delays nobody.
//!
//! `owner.rs` has the publisher and the interface for its owner. `moves.rs` takes buffers back
//! and moves them. `offer.rs` sends offers and notices. `serve.rs` runs the event loop.

mod budget;
mod connection;
mod event;
mod id;
mod moves;
mod offer;
mod owner;
mod published;
mod serve;

pub use event::{CutOff, Event, Migration};
pub use id::{BufferId, SubscriberId};
pub use owner::{Fault, Publisher};
