//! What can be moved to another thread and used from several. It compiles, or it does not.

use std::os::fd::AsFd;

use peerbuf_rdma::{
    Card, Completion, Connection, Domain, Endpoint, Follower, Piece, RdmaError, Registration,
    Remote, Sge, libfabric,
};

fn any_thread<T: Send + Sync>() {}

#[test]
fn all_of_it_goes_to_any_thread() {
    any_thread::<Card>();
    any_thread::<Completion>();
    any_thread::<Connection>();
    any_thread::<Domain>();
    any_thread::<Endpoint>();
    any_thread::<Follower>();
    any_thread::<Piece>();
    any_thread::<RdmaError>();
    any_thread::<Registration>();
    any_thread::<Remote>();
    any_thread::<Sge>();
    any_thread::<libfabric::Domain>();
    any_thread::<libfabric::Registration>();
    any_thread::<libfabric::Remote>();
}

#[test]
fn a_connection_can_be_waited_for_with_other_things() {
    fn shows_a_descriptor<T: AsFd>() {}
    shows_a_descriptor::<Connection>();
}
