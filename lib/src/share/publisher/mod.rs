//! The side that owns buffers: offers them, takes them back, moves them.
//!
//! One thread does everything: nothing happens but in a call of [`Publisher`]. The state of each
//! subscriber says what it is still to be told, and [`Publisher::pump`] tells it as far as there
//! is room in its socket, so that one that does not read holds nobody up.
//!
//! `owner.rs` has the publisher and what its owner asks of it. `moves.rs` takes buffers back and moves
//! them, `offer.rs` tells subscribers what they are to know, `serve.rs` turns the loop.

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
