//! Types that can move to another thread (`Send`) or also be shared (`Sync`), checked by compilation.

use std::os::fd::AsFd;

use peerbuf::error::{
    ControlError, ExportError, ImportError, ProbeError, ShareError, TransferError, Unavailable,
};
use peerbuf::plan::Plan;
use peerbuf::transfer::Receipt;
use peerbuf::{device, export, import, share};

fn any_thread<T: Send + Sync>() {}
fn owned<T: 'static>() {}

#[test]
fn devices_and_exporters_go_to_any_thread() {
    any_thread::<device::drm::Card>();
    any_thread::<device::edu::Edu>();
    any_thread::<device::v4l2::VideoDevice>();
    any_thread::<device::vfio::Registers>();
    any_thread::<device::vfio::VfioDevice>();
    any_thread::<export::heap::Heap>();
    any_thread::<export::peerbuf::Device>();
    any_thread::<export::peerbuf::Watch>();
    any_thread::<export::v4l2::Capture>();
    any_thread::<export::gpu::Exported>();
    any_thread::<device::vulkan::Device>();
    any_thread::<device::vulkan::Memory>();
}

#[test]
fn importers_and_attachments_go_to_any_thread() {
    any_thread::<import::file::FileImporter>();
    any_thread::<import::drm::DrmImporter>();
    any_thread::<import::vfio::VfioImporter>();
    any_thread::<import::iommufd::AddressSpace>();
    any_thread::<import::probe::Probe>();
    any_thread::<import::cpu::Attachment>();
    any_thread::<import::file::Attachment>();
    any_thread::<import::drm::Attachment>();
    any_thread::<import::v4l2::Attachment>();
    any_thread::<import::vfio::Attachment>();
    any_thread::<import::iommufd::Attachment>();
    any_thread::<import::probe::Attachment>();
    any_thread::<import::vulkan::VulkanImporter>();
    any_thread::<import::vulkan::Attachment>();
}

#[test]
fn an_attachment_owns_what_it_needs() {
    owned::<import::cpu::Attachment>();
    owned::<import::file::Attachment>();
    owned::<import::drm::Attachment>();
    owned::<import::v4l2::Attachment>();
    owned::<import::vfio::Attachment>();
    owned::<import::iommufd::Attachment>();
    owned::<import::probe::Attachment>();
    owned::<import::vulkan::Attachment>();
}

#[test]
fn what_a_program_waits_for_shows_a_descriptor() {
    fn shows_a_descriptor<T: AsFd>() {}
    shows_a_descriptor::<share::Channel>();
    shows_a_descriptor::<share::Listener>();
    shows_a_descriptor::<share::Publisher>();
    shows_a_descriptor::<export::peerbuf::Watch>();
}

#[test]
fn sharing_goes_to_any_thread() {
    any_thread::<share::Channel>();
    any_thread::<share::Subscriber>();
    any_thread::<share::Listener>();
    any_thread::<share::tokio::Publisher>();
    any_thread::<share::tokio::Subscriber>();
    // One thread at a time serves a publisher, whose backings belong to that thread.
    fn moves<T: Send>() {}
    moves::<share::Publisher>();
}

#[test]
fn what_is_said_goes_to_any_thread() {
    any_thread::<Plan>();
    any_thread::<Receipt>();
    any_thread::<ControlError>();
    any_thread::<ExportError>();
    any_thread::<ImportError>();
    any_thread::<ProbeError>();
    any_thread::<ShareError>();
    any_thread::<TransferError>();
    any_thread::<Unavailable>();
}
