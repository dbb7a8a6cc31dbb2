//! Work on a queue: its commands, the fences that it waits for, and the fences that signal its
//! end.

use std::any::Any;
use std::fmt;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ash::vk;
use peerbuf_core::SyncFile;

use super::device::{Device, Fences};
use super::memory::{Memory, Staging};
use crate::buffer::{Access, DmaBuf};
use crate::error::{BufferError, ImportError, VulkanError};

const SYNC_FD: vk::ExternalSemaphoreHandleTypeFlags = vk::ExternalSemaphoreHandleTypeFlags::SYNC_FD;

/// The use of one memory by commands.
#[derive(Debug, Clone, Copy)]
pub struct Use<'m> {
    /// The memory.
    pub memory: &'m Memory,
    /// Whether the commands read its bytes, write them, or both.
    pub access: Access,
}

/// Work that was submitted to a queue. Dropping it waits until the queue is done.
///
/// With sync files, other users of the dma-bufs wait for the work on their own: disks, devices
/// of other drivers, and the CPU when it begins access.
#[must_use = "dropping it waits for the queue"]
pub struct Work {
    done: bool,
    fences: Fences,
    fence: vk::Fence,
    semaphores: Vec<vk::Semaphore>,
    pool: vk::CommandPool,
    descriptors: vk::DescriptorPool,
    device: Device,
    /// Last fields: the memories are destroyed after the commands.
    memories: Vec<(Memory, Access)>,
    /// Other objects that the commands use.
    held: Vec<Arc<dyn Any + Send + Sync>>,
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work")
            .field("done", &self.done)
            .field("fences", &self.fences)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let raw = self.device.raw();
        if !self.done && self.fence != vk::Fence::null() {
            // A lost device is done, too.
            // SAFETY: the fence belongs to this device, and was submitted to the queue.
            let _ = unsafe { raw.wait_for_fences(&[self.fence], true, u64::MAX) };
        }
        // SAFETY: this crate made the fence on this device, or the handle is null; the queue is
        // done with it.
        unsafe { raw.destroy_fence(self.fence, None) };
        for &semaphore in &self.semaphores {
            // SAFETY: this crate made the semaphore on this device, and the queue is done with
            // it.
            unsafe { raw.destroy_semaphore(semaphore, None) };
        }
        // SAFETY: this crate made the pool on this device, or the handle is null; the queue is
        // done with its commands.
        unsafe { raw.destroy_command_pool(self.pool, None) };
        // SAFETY: this crate made the pool on this device, or the handle is null; the queue is
        // done with its sets.
        unsafe { raw.destroy_descriptor_pool(self.descriptors, None) };
    }
}

impl Device {
    /// Submits the commands that `record` records, ordered after the present users of the
    /// dma-bufs and before the future ones.
    ///
    /// The commands wait for the fences of the dma-bufs: the fences of writers for
    /// [`Access::Read`], all fences otherwise. The dma-bufs get the work's own fence.
    /// [`Device::fences`] tells how. Before the first command, each memory is acquired from its
    /// other users. After the last command, each memory is released to them. All earlier writes
    /// are visible. The caller is responsible for the commands and for everything else that
    /// they use.
    ///
    /// `limit` limits waits of the CPU, which happen without sync files, and with lavapipe,
    /// whose calls return when the work is done. [`Duration::MAX`] is no limit.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use peerbuf::Access;
    /// # use peerbuf::device::vulkan::{Memory, Use};
    /// # fn fill(memory: &Memory) -> Result<(), peerbuf::error::ImportError> {
    /// let limit = Duration::from_secs(1);
    /// let uses = [Use { memory, access: Access::Write }];
    /// let work = memory.device().submit(&uses, limit, |raw, commands| {
    ///     // SAFETY: the buffer is of the device, may be transferred to, and has so many bytes.
    ///     unsafe { raw.cmd_fill_buffer(commands, memory.handle(), 0, memory.size(), 7) };
    /// })?;
    /// work.wait(limit)
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`BufferError::TimedOut`] if a wait of the CPU exceeded `limit`; [`ImportError::Vulkan`]
    /// for a failed Vulkan call; [`ImportError::Buffer`] for the fences of a dma-buf. No work
    /// is running in these cases.
    pub fn submit(
        &self,
        uses: &[Use<'_>],
        limit: Duration,
        record: impl FnOnce(&ash::Device, vk::CommandBuffer),
    ) -> Result<Work, ImportError> {
        let work = self.begin(uses)?;
        self.finish(work, limit, record)
    }

    /// Work without commands.
    pub(super) fn begin(&self, uses: &[Use<'_>]) -> Result<Work, ImportError> {
        let mut work = Work {
            done: true,
            fences: self.fences(),
            fence: vk::Fence::null(),
            semaphores: Vec::new(),
            pool: vk::CommandPool::null(),
            descriptors: vk::DescriptorPool::null(),
            device: self.clone(),
            memories: Vec::new(),
            held: Vec::new(),
        };
        for used in uses {
            let memory = used.memory.clone();
            if memory.device().raw().handle() != self.raw().handle() {
                let name = memory.buffer().name();
                let error = VulkanError::new("vkQueueSubmit", name, vk::Result::ERROR_UNKNOWN);
                let hint = format!(": it is memory of another device than {}", self.name());
                return Err(error.with_hint(hint).into());
            }
            // A dma-buf has one set of fences, and a buffer has one owner.
            let known = work
                .memories
                .iter_mut()
                .find(|(known, _)| known.handle() == memory.handle());
            match known {
                Some((_, access)) if *access != used.access => *access = Access::ReadWrite,
                Some(_) => {}
                None => work.memories.push((memory, used.access)),
            }
        }
        Ok(work)
    }

    /// Copies between a memory and staging memory.
    pub(crate) fn copy(
        &self,
        memory: &Memory,
        access: Access,
        staging: &Staging,
        (offset, length): (u64, u64),
        limit: Duration,
    ) -> Result<(), ImportError> {
        let mut work = self.begin(&[Use { memory, access }])?;
        work.hold(staging.keep());
        let (ours, theirs) = (staging.handle(), memory.handle());
        let region = vk::BufferCopy::default().size(length);
        let work = self.finish(work, limit, |raw, commands| match access {
            Access::Read => {
                let region = region.src_offset(offset);
                // SAFETY: both buffers belong to this device, allow transfers, and have this
                // many bytes at the offsets.
                unsafe { raw.cmd_copy_buffer(commands, theirs, ours, &[region]) };
            }
            Access::Write | Access::ReadWrite => {
                let region = region.dst_offset(offset);
                // SAFETY: both buffers belong to this device, allow transfers, and have this
                // many bytes at the offsets.
                unsafe { raw.cmd_copy_buffer(commands, ours, theirs, &[region]) };
            }
        })?;
        work.wait(limit)
    }

    /// Records the commands and submits them.
    pub(super) fn finish(
        &self,
        mut work: Work,
        limit: Duration,
        record: impl FnOnce(&ash::Device, vk::CommandBuffer),
    ) -> Result<Work, ImportError> {
        let begun = Instant::now();
        let raw = self.raw();
        let failed = |call| move |result| VulkanError::new(call, self.name(), result);

        let info = vk::CommandPoolCreateInfo::default()
            .queue_family_index(self.queue_family())
            .flags(vk::CommandPoolCreateFlags::TRANSIENT);
        // SAFETY: the family is one of the device's.
        work.pool = unsafe { raw.create_command_pool(&info, None) }
            .map_err(failed("vkCreateCommandPool"))?;
        let info = vk::CommandBufferAllocateInfo::default()
            .command_pool(work.pool)
            .level(vk::CommandBufferLevel::PRIMARY)
            .command_buffer_count(1);
        // SAFETY: the pool is new, and nobody else has it.
        let commands = unsafe { raw.allocate_command_buffers(&info) }
            .map_err(failed("vkAllocateCommandBuffers"))?;
        let info = vk::CommandBufferBeginInfo::default()
            .flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        // SAFETY: the command buffer is new.
        unsafe { raw.begin_command_buffer(commands[0], &info) }
            .map_err(failed("vkBeginCommandBuffer"))?;
        self.barrier(&work, commands[0], true);
        record(raw, commands[0]);
        self.barrier(&work, commands[0], false);
        // SAFETY: the commands are being recorded.
        unsafe { raw.end_command_buffer(commands[0]) }.map_err(failed("vkEndCommandBuffer"))?;

        let waited = self.wait_for_others(&mut work, limit)?;
        let ends = self.semaphore_for_end(&mut work)?;
        // SAFETY: the default struct asks for no options.
        work.fence = unsafe { raw.create_fence(&Default::default(), None) }
            .map_err(failed("vkCreateFence"))?;
        let stages = vec![vk::PipelineStageFlags::ALL_COMMANDS; waited.len()];
        let submit = vk::SubmitInfo::default()
            .wait_semaphores(&waited)
            .wait_dst_stage_mask(&stages)
            .command_buffers(&commands)
            .signal_semaphores(&ends);
        // SAFETY: the handles belong to this device and live until the work is done (`Work`
        // holds them). Nobody else uses the queue now: the lock excludes this crate's calls,
        // and the owner of the queue guarantees the rest.
        unsafe { raw.queue_submit(*self.queue(), &[submit], work.fence) }
            .map_err(failed("vkQueueSubmit"))?;
        work.done = false;
        // The work runs from here on, and an error waits for its end.
        match ends.first() {
            Some(&end) => self.publish(&work, end)?,
            None => work.wait_here(limit.saturating_sub(begun.elapsed()))?,
        }
        Ok(work)
    }

    /// Acquires the memories from their other users, or releases them.
    fn barrier(&self, work: &Work, commands: vk::CommandBuffer, acquire: bool) {
        let (ours, others) = (self.queue_family(), self.foreign_family());
        let all = vk::AccessFlags::MEMORY_READ | vk::AccessFlags::MEMORY_WRITE;
        let barriers: Vec<_> = work
            .memories
            .iter()
            .map(|(memory, _)| {
                let barrier = vk::BufferMemoryBarrier::default()
                    .buffer(memory.handle())
                    .size(vk::WHOLE_SIZE);
                match acquire {
                    true => barrier
                        .src_queue_family_index(others)
                        .dst_queue_family_index(ours)
                        .dst_access_mask(all),
                    false => barrier
                        .src_queue_family_index(ours)
                        .dst_queue_family_index(others)
                        .src_access_mask(all),
                }
            })
            .collect();
        let (top, bottom) = (
            vk::PipelineStageFlags::TOP_OF_PIPE,
            vk::PipelineStageFlags::BOTTOM_OF_PIPE,
        );
        let every = vk::PipelineStageFlags::ALL_COMMANDS;
        let (from, to) = if acquire {
            (top, every)
        } else {
            (every, bottom)
        };
        let none = vk::DependencyFlags::empty();
        // SAFETY: the commands are being recorded, and the buffers belong to this device.
        unsafe {
            self.raw()
                .cmd_pipeline_barrier(commands, from, to, none, &[], &barriers, &[]);
        }
    }

    /// Makes semaphores that signal when the present users of the dma-bufs are done. Returns
    /// none if the CPU has waited for these users.
    fn wait_for_others(
        &self,
        work: &mut Work,
        limit: Duration,
    ) -> Result<Vec<vk::Semaphore>, ImportError> {
        let begun = Instant::now();
        let mut waited = Vec::new();
        let semaphore_fd = self.semaphore_fd();
        for (memory, access) in &work.memories {
            let Some(dmabuf) = memory.buffer().dmabuf() else {
                continue;
            };
            let Ok(semaphore_fd) = semaphore_fd else {
                let left = limit.saturating_sub(begun.elapsed());
                dmabuf.wait(*access, left)?;
                continue;
            };
            // lavapipe's vkGetSemaphoreFdKHR returns when the work is done, and so after these
            // fences, however late.
            if self.is_lavapipe() && limit != Duration::MAX {
                dmabuf.wait(*access, limit.saturating_sub(begun.elapsed()))?;
            }
            let failed =
                |call| move |result| VulkanError::new(call, memory.buffer().name(), result);
            let fences: OwnedFd = dmabuf.export_sync_file(*access)?.into();
            let info = vk::SemaphoreCreateInfo::default();
            // SAFETY: the struct is valid.
            let semaphore = unsafe { self.raw().create_semaphore(&info, None) }
                .map_err(failed("vkCreateSemaphore"))?;
            work.semaphores.push(semaphore);
            let number = fences.into_raw_fd();
            let info = vk::ImportSemaphoreFdInfoKHR::default()
                .semaphore(semaphore)
                .flags(vk::SemaphoreImportFlags::TEMPORARY)
                .handle_type(SYNC_FD)
                .fd(number);
            // SAFETY: the semaphore is new, and the descriptor is a sync file that the driver
            // owns on success.
            unsafe { semaphore_fd.import_semaphore_fd(&info) }.map_err(|result| {
                // SAFETY: the driver did not take the descriptor, so the caller still owns it.
                drop(unsafe { OwnedFd::from_raw_fd(number) });
                failed("vkImportSemaphoreFdKHR")(result)
            })?;
            waited.push(semaphore);
        }
        Ok(waited)
    }

    /// Makes the semaphore that signals the work's end. Returns none if the CPU waits for the
    /// end.
    fn semaphore_for_end(&self, work: &mut Work) -> Result<Vec<vk::Semaphore>, VulkanError> {
        if self.semaphore_fd().is_err() || work.memories.is_empty() {
            return Ok(Vec::new());
        }
        let mut export = vk::ExportSemaphoreCreateInfo::default().handle_types(SYNC_FD);
        let info = vk::SemaphoreCreateInfo::default().push_next(&mut export);
        // SAFETY: the structs are valid, and the driver exports this handle type.
        let semaphore = unsafe { self.raw().create_semaphore(&info, None) }
            .map_err(|result| VulkanError::new("vkCreateSemaphore", self.name(), result))?;
        work.semaphores.push(semaphore);
        Ok(vec![semaphore])
    }

    /// Adds the work's fence to the dma-bufs.
    fn publish(&self, work: &Work, end: vk::Semaphore) -> Result<(), ImportError> {
        let Ok(semaphore_fd) = self.semaphore_fd() else {
            return Ok(());
        };
        let info = vk::SemaphoreGetFdInfoKHR::default()
            .semaphore(end)
            .handle_type(SYNC_FD);
        // SAFETY: the semaphore was made for this export, and its signal is submitted.
        let number = unsafe { semaphore_fd.get_semaphore_fd(&info) }
            .map_err(|result| VulkanError::new("vkGetSemaphoreFdKHR", self.name(), result))?;
        // A descriptor of -1 means that the work is done.
        if number == -1 {
            return Ok(());
        }
        // SAFETY: the driver has opened this descriptor for the caller, who owns it alone.
        let fences = SyncFile::from_fd(unsafe { OwnedFd::from_raw_fd(number) })?;
        for (memory, access) in &work.memories {
            if let Some(dmabuf) = memory.buffer().dmabuf() {
                dmabuf.import_sync_file(&fences, *access)?;
            }
        }
        Ok(())
    }
}

impl Work {
    /// How the work and the dma-bufs' fences waited for each other.
    pub fn fences(&self) -> &Fences {
        &self.fences
    }

    pub(super) fn hold(&mut self, what: Arc<dyn Any + Send + Sync>) {
        self.held.push(what);
    }

    pub(super) fn set_descriptors(&mut self, pool: vk::DescriptorPool) {
        self.descriptors = pool;
    }

    /// Waits until the queue is done, at most for `limit`. Afterwards other users see the
    /// bytes. If the limit passes, the work goes on, and dropping it waits without a limit.
    ///
    /// # Errors
    /// [`BufferError::TimedOut`], or [`ImportError::Vulkan`], with `ERROR_DEVICE_LOST` if the
    /// work failed.
    pub fn wait(mut self, limit: Duration) -> Result<(), ImportError> {
        self.wait_here(limit)
    }

    /// True if the queue is done.
    ///
    /// # Errors
    /// [`ImportError::Vulkan`].
    pub fn is_done(&self) -> Result<bool, ImportError> {
        if self.done {
            return Ok(true);
        }
        // SAFETY: the fence belongs to this device, and was submitted to the queue.
        let status = unsafe { self.device.raw().get_fence_status(self.fence) };
        status.map_err(|result| {
            VulkanError::new("vkGetFenceStatus", self.device.name(), result).into()
        })
    }

    fn wait_here(&mut self, limit: Duration) -> Result<(), ImportError> {
        if self.done {
            return Ok(());
        }
        let begun = Instant::now();
        let time = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        // SAFETY: the fence belongs to this device, and was submitted to the queue.
        let waited = unsafe { self.device.raw().wait_for_fences(&[self.fence], true, time) };
        match waited {
            Ok(()) => {}
            Err(vk::Result::TIMEOUT) => {
                let object = format!("the queue of {}", self.device.name());
                return Err(BufferError::TimedOut { object, limit }.into());
            }
            Err(result) => {
                let name = self.device.name();
                return Err(VulkanError::new("vkWaitForFences", name, result).into());
            }
        }
        self.done = true;
        self.settle(limit.saturating_sub(begun.elapsed()))
    }

    /// Makes the CPU's writes arrive. A driver that works on the CPU does not tell the exporter
    /// (lavapipe calls no `DMA_BUF_IOCTL_SYNC`), and writes of the CPU to a BAR may still be in
    /// flight.
    fn settle(&self, limit: Duration) -> Result<(), ImportError> {
        if !self.device.is_software() {
            return Ok(());
        }
        for (memory, access) in &self.memories {
            let buffer = memory.buffer();
            if !access.writes() || buffer.provenance().kind.is_host_memory() {
                continue;
            }
            buffer
                .dmabuf()
                .map_or(Ok(()), |dmabuf: &DmaBuf| dmabuf.settle(limit))?;
        }
        Ok(())
    }
}
