//! Compute shaders over memories.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ash::vk;

use super::device::Device;
use super::memory::Memory;
use super::spirv;
use super::work::{Use, Work};
use crate::buffer::Access;
use crate::error::{BufferError, ImportError, VulkanError};

/// A compute shader of this crate, for tests and demonstrations. It applies a [`Formula`] to
/// each 32-bit word of one memory and writes the results to another memory, which shows that a
/// device computes on the bytes of a dma-buf. Clones refer to the same shader.
#[derive(Clone)]
pub struct Affine {
    inner: Arc<Inner>,
}

struct Inner {
    device: Device,
    module: vk::ShaderModule,
    set: vk::DescriptorSetLayout,
    layout: vk::PipelineLayout,
    pipeline: vk::Pipeline,
}

impl fmt::Debug for Affine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Affine")
            .field("device", &self.inner.device)
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let raw = self.device.raw();
        // SAFETY: this crate made the pipeline on this device, or the handle is null; work that
        // uses it holds this value until the work is done.
        unsafe { raw.destroy_pipeline(self.pipeline, None) };
        // SAFETY: this crate made the layout on this device, or the handle is null; the
        // pipeline that used it is destroyed.
        unsafe { raw.destroy_pipeline_layout(self.layout, None) };
        // SAFETY: this crate made the set layout on this device, or the handle is null; the
        // layout that used it is destroyed.
        unsafe { raw.destroy_descriptor_set_layout(self.set, None) };
        // SAFETY: this crate made the module on this device, or the handle is null; the
        // pipeline that used it is destroyed.
        unsafe { raw.destroy_shader_module(self.module, None) };
    }
}

/// The result for word number `i`: `word * factor + i * step + base`, modulo 2^32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Formula {
    /// Factor of the word.
    pub factor: u32,
    /// Factor of the word's number.
    pub step: u32,
    /// Summand for all words.
    pub base: u32,
}

impl Formula {
    /// Inverts each bit.
    pub const COMPLEMENT: Formula = Formula {
        factor: u32::MAX,
        step: 0,
        base: u32::MAX,
    };

    /// Computes the result for one word on the CPU.
    pub fn of(self, word: u32, i: u32) -> u32 {
        let product = word.wrapping_mul(self.factor);
        let sum = product.wrapping_add(i.wrapping_mul(self.step));
        sum.wrapping_add(self.base)
    }
}

/// The words of a memory from an offset on.
#[derive(Debug, Clone, Copy)]
pub struct Words<'m> {
    /// The memory.
    pub memory: &'m Memory,
    /// The offset of the first word in bytes: a multiple of the device's
    /// `minStorageBufferOffsetAlignment` (64 for lavapipe, at most 256).
    pub offset: u64,
}

impl Affine {
    /// Makes the shader for a device.
    ///
    /// # Errors
    /// [`VulkanError`], such as `ERROR_OUT_OF_DEVICE_MEMORY`.
    pub fn new(device: &Device) -> Result<Affine, VulkanError> {
        let raw = device.raw();
        let failed = |call| move |result| VulkanError::new(call, device.name(), result);
        let mut inner = Inner {
            device: device.clone(),
            module: vk::ShaderModule::null(),
            set: vk::DescriptorSetLayout::null(),
            layout: vk::PipelineLayout::null(),
            pipeline: vk::Pipeline::null(),
        };
        let words = spirv::words();
        let info = vk::ShaderModuleCreateInfo::default().code(&words);
        // SAFETY: the words are a valid module that uses only features of every Vulkan 1.1
        // device.
        inner.module = unsafe { raw.create_shader_module(&info, None) }
            .map_err(failed("vkCreateShaderModule"))?;
        let binding = |number| {
            vk::DescriptorSetLayoutBinding::default()
                .binding(number)
                .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)
        };
        let bindings = [binding(0), binding(1)];
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        // SAFETY: the structs are valid.
        inner.set = unsafe { raw.create_descriptor_set_layout(&info, None) }
            .map_err(failed("vkCreateDescriptorSetLayout"))?;
        let sets = [inner.set];
        let constants = [vk::PushConstantRange::default()
            .stage_flags(vk::ShaderStageFlags::COMPUTE)
            .size(4 * spirv::CONSTANTS)];
        let info = vk::PipelineLayoutCreateInfo::default()
            .set_layouts(&sets)
            .push_constant_ranges(&constants);
        // SAFETY: the structs are valid; every device supports this size of push constants.
        inner.layout = unsafe { raw.create_pipeline_layout(&info, None) }
            .map_err(failed("vkCreatePipelineLayout"))?;
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(inner.module)
            .name(c"main");
        let info = vk::ComputePipelineCreateInfo::default()
            .stage(stage)
            .layout(inner.layout);
        let none = vk::PipelineCache::null();
        // SAFETY: the module has this entry point, and the layout matches the module.
        let made = unsafe { raw.create_compute_pipelines(none, &[info], None) };
        let made = made.map_err(|(_, result)| failed("vkCreateComputePipelines")(result))?;
        inner.pipeline = made.first().copied().unwrap_or_default();
        let inner = Arc::new(inner);
        Ok(Affine { inner })
    }

    /// Submits the computation of `count` words. `limit` limits waits of the CPU, as in
    /// [`Device::submit`]. `from` and `to` may be the same words.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`] for words outside of a memory, or more words than the device
    /// takes at once; [`ImportError::Vulkan`] for an offset that the device does not take; the
    /// errors of [`Device::submit`].
    pub fn run(
        &self,
        from: Words<'_>,
        to: Words<'_>,
        count: u32,
        formula: Formula,
        limit: Duration,
    ) -> Result<Work, ImportError> {
        let device = &self.inner.device;
        let limits = device.limits();
        let bytes = 4 * u64::from(count);
        for words in [from, to] {
            let (offset, size) = (words.offset, words.memory.size());
            let most = size.saturating_sub(offset);
            let most = most.min(u64::from(limits.max_storage_buffer_range));
            if bytes == 0 || bytes > most {
                let object = words.memory.buffer().name().to_owned();
                let length = bytes;
                return Err(BufferError::OutOfRange {
                    object,
                    offset,
                    length,
                    size,
                }
                .into());
            }
            let aligned = limits.min_storage_buffer_offset_alignment.max(4);
            if !offset.is_multiple_of(aligned) {
                let name = words.memory.buffer().name();
                let hint = format!(": the offset, {offset}, must be a multiple of {aligned}");
                let result = vk::Result::ERROR_UNKNOWN;
                let error = VulkanError::new("vkUpdateDescriptorSets", name, result);
                return Err(error.with_hint(hint).into());
            }
        }
        let uses = [
            Use {
                memory: from.memory,
                access: Access::Read,
            },
            Use {
                memory: to.memory,
                access: Access::Write,
            },
        ];
        let mut work = device.begin(&uses)?;
        work.hold(Arc::clone(&self.inner) as _);
        let set = self.descriptors(&mut work, [from, to], bytes)?;
        let groups = count.div_ceil(spirv::GROUP);
        let across = groups.min(limits.max_compute_work_group_count[0]);
        let Formula { factor, step, base } = formula;
        let row = across * spirv::GROUP;
        let constants: [u32; spirv::CONSTANTS as usize] = [count, row, factor, step, base];
        let inner = &self.inner;
        device.finish(work, limit, |raw, commands| {
            let point = vk::PipelineBindPoint::COMPUTE;
            // SAFETY: the commands are being recorded, and the pipeline belongs to this device.
            unsafe { raw.cmd_bind_pipeline(commands, point, inner.pipeline) };
            // SAFETY: the set has the pipeline's layout.
            unsafe {
                raw.cmd_bind_descriptor_sets(commands, point, inner.layout, 0, &[set], &[]);
            }
            let stage = vk::ShaderStageFlags::COMPUTE;
            let bytes = bytemuck::cast_slice(&constants);
            // SAFETY: the layout has this size of constants.
            unsafe { raw.cmd_push_constants(commands, inner.layout, stage, 0, bytes) };
            // SAFETY: everything is bound, and the shader ignores words beyond the count. A
            // buffer that a device accepts has fewer groups than the device's limit.
            unsafe { raw.cmd_dispatch(commands, across, groups.div_ceil(across), 1) };
        })
    }

    fn descriptors(
        &self,
        work: &mut Work,
        words: [Words<'_>; 2],
        bytes: u64,
    ) -> Result<vk::DescriptorSet, VulkanError> {
        let device = &self.inner.device;
        let raw = device.raw();
        let failed = |call| move |result| VulkanError::new(call, device.name(), result);
        let kind = vk::DescriptorType::STORAGE_BUFFER;
        let sizes = [vk::DescriptorPoolSize::default()
            .ty(kind)
            .descriptor_count(2)];
        let info = vk::DescriptorPoolCreateInfo::default()
            .max_sets(1)
            .pool_sizes(&sizes);
        // SAFETY: the structs are valid.
        let pool = unsafe { raw.create_descriptor_pool(&info, None) }
            .map_err(failed("vkCreateDescriptorPool"))?;
        work.set_descriptors(pool);
        let layouts = [self.inner.set];
        let info = vk::DescriptorSetAllocateInfo::default()
            .descriptor_pool(pool)
            .set_layouts(&layouts);
        // SAFETY: the pool is new and has room for the set.
        let sets = unsafe { raw.allocate_descriptor_sets(&info) }
            .map_err(failed("vkAllocateDescriptorSets"))?;
        let buffers = words.map(|words| {
            [vk::DescriptorBufferInfo::default()
                .buffer(words.memory.handle())
                .offset(words.offset)
                .range(bytes)]
        });
        let write = |binding: u32, buffer| {
            vk::WriteDescriptorSet::default()
                .dst_set(sets[0])
                .dst_binding(binding)
                .descriptor_type(kind)
                .buffer_info(buffer)
        };
        let writes = [write(0, &buffers[0]), write(1, &buffers[1])];
        // SAFETY: the set is new, and the checks in `run` ensure that the buffers contain the
        // ranges.
        unsafe { raw.update_descriptor_sets(&writes, &[]) };
        Ok(sets[0])
    }
}
