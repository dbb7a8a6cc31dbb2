//! The crate on machines that are made up: what is predicted, why, from which format, and at what cost.

mod common;
mod foreign;
mod machines;
mod reasons;
mod scale;
