//! The crate's own shader, as SPIR-V 1.3. This module assembles the shader, so neither the
//! build nor the run needs a compiler, and the source shows exactly what runs. In GLSL:
//!
//! ```glsl
//! layout(local_size_x = 64) in;
//! layout(push_constant) uniform Constants { uint count; uint row; uint factor; uint step; uint base; };
//! layout(set = 0, binding = 0) buffer Source { uint from[]; };
//! layout(set = 0, binding = 1) buffer Sink { uint to[]; };
//!
//! void main() {
//!     uint i = gl_GlobalInvocationID.y * row + gl_GlobalInvocationID.x;
//!     if (i < count) to[i] = from[i] * factor + i * step + base;
//! }
//! ```
//!
//! <https://registry.khronos.org/SPIR-V/specs/unified1/SPIRV.html>

/// Number of invocations in a group, along x.
pub(super) const GROUP: u32 = 64;
/// Number of push constants: `count`, `row`, `factor`, `step` and `base`.
pub(super) const CONSTANTS: u32 = 5;

/// The module's words.
pub(super) fn words() -> Vec<u32> {
    let mut module = Module::default();
    let m = &mut module;
    let [void, function, uint, vector, boolean] = m.names();
    let [input_vector, input_uint, invocation] = m.names();
    let [array, block, storage_block, storage_uint, source, sink] = m.names();
    let [constants, push_constants, push_uint, pushed] = m.names();
    let [zero, one, two, three, four] = m.names();
    let [main, entry, inside, end] = m.names();

    m.op(17, &[1]); // OpCapability Shader
    m.op(14, &[0, 1]); // OpMemoryModel Logical GLSL450
    let name = u32::from_le_bytes(*b"main");
    m.op(15, &[5, main, name, 0, invocation]); // OpEntryPoint GLCompute
    m.op(16, &[main, 17, GROUP, 1, 1]); // OpExecutionMode LocalSize

    m.op(71, &[invocation, 11, 28]); // OpDecorate BuiltIn GlobalInvocationId
    m.op(71, &[array, 6, 4]); // OpDecorate ArrayStride 4
    m.op(71, &[block, 2]); // OpDecorate Block
    m.op(72, &[block, 0, 35, 0]); // OpMemberDecorate Offset 0
    m.op(71, &[constants, 2]); // OpDecorate Block
    for member in 0..CONSTANTS {
        m.op(72, &[constants, member, 35, 4 * member]); // OpMemberDecorate Offset
    }
    for (binding, variable) in [(0, source), (1, sink)] {
        m.op(71, &[variable, 34, 0]); // OpDecorate DescriptorSet 0
        m.op(71, &[variable, 33, binding]); // OpDecorate Binding
    }

    const INPUT: u32 = 1;
    const PUSH_CONSTANT: u32 = 9;
    const STORAGE_BUFFER: u32 = 12;
    m.op(19, &[void]); // OpTypeVoid
    m.op(33, &[function, void]); // OpTypeFunction
    m.op(20, &[boolean]); // OpTypeBool
    m.op(21, &[uint, 32, 0]); // OpTypeInt
    m.op(23, &[vector, uint, 3]); // OpTypeVector
    m.op(32, &[input_vector, INPUT, vector]); // OpTypePointer
    m.op(32, &[input_uint, INPUT, uint]);
    m.op(29, &[array, uint]); // OpTypeRuntimeArray
    m.op(30, &[block, array]); // OpTypeStruct
    m.op(32, &[storage_block, STORAGE_BUFFER, block]);
    m.op(32, &[storage_uint, STORAGE_BUFFER, uint]);
    m.op(30, &[constants, uint, uint, uint, uint, uint]);
    m.op(32, &[push_constants, PUSH_CONSTANT, constants]);
    m.op(32, &[push_uint, PUSH_CONSTANT, uint]);
    for (number, name) in (0..).zip([zero, one, two, three, four]) {
        m.op(43, &[uint, name, number]); // OpConstant
    }
    m.op(59, &[input_vector, invocation, INPUT]); // OpVariable
    m.op(59, &[storage_block, source, STORAGE_BUFFER]);
    m.op(59, &[storage_block, sink, STORAGE_BUFFER]);
    m.op(59, &[push_constants, pushed, PUSH_CONSTANT]);

    m.op(54, &[void, main, 0, function]); // OpFunction
    m.op(248, &[entry]); // OpLabel
    let x = m.load(uint, input_uint, &[invocation, zero]);
    let y = m.load(uint, input_uint, &[invocation, one]);
    let count = m.load(uint, push_uint, &[pushed, zero]);
    let row = m.load(uint, push_uint, &[pushed, one]);
    let factor = m.load(uint, push_uint, &[pushed, two]);
    let step = m.load(uint, push_uint, &[pushed, three]);
    let base = m.load(uint, push_uint, &[pushed, four]);
    let before = m.result(132, uint, &[y, row]); // OpIMul
    let i = m.result(128, uint, &[before, x]); // OpIAdd
    let is_inside = m.result(176, boolean, &[i, count]); // OpULessThan
    m.op(247, &[end, 0]); // OpSelectionMerge
    m.op(250, &[is_inside, inside, end]); // OpBranchConditional
    m.op(248, &[inside]);
    let word = m.load(uint, storage_uint, &[source, zero, i]);
    let product = m.result(132, uint, &[word, factor]);
    let steps = m.result(132, uint, &[i, step]);
    let sum = m.result(128, uint, &[product, steps]);
    let sum = m.result(128, uint, &[sum, base]);
    let place = m.result(65, storage_uint, &[sink, zero, i]); // OpAccessChain
    m.op(62, &[place, sum]); // OpStore
    m.op(249, &[end]); // OpBranch
    m.op(248, &[end]);
    m.op(253, &[]); // OpReturn
    m.op(56, &[]); // OpFunctionEnd

    let mut words = vec![0x0723_0203, 0x0001_0300, 0, module.named + 1, 0];
    words.extend(module.words);
    words
}

/// Instructions, and the number of ids in use.
#[derive(Default)]
struct Module {
    words: Vec<u32>,
    named: u32,
}

impl Module {
    fn names<const N: usize>(&mut self) -> [u32; N] {
        std::array::from_fn(|_| {
            self.named += 1;
            self.named
        })
    }

    fn op(&mut self, code: u32, operands: &[u32]) {
        let length = operands.len() as u32 + 1;
        self.words.push(length << 16 | code);
        self.words.extend(operands);
    }

    /// Adds an instruction with a result of this type, and returns the result's id.
    fn result(&mut self, code: u32, kind: u32, operands: &[u32]) -> u32 {
        let [name] = self.names();
        self.op(code, &[&[kind, name], operands].concat());
        name
    }

    /// Loads the value at a place: OpAccessChain, OpLoad.
    fn load(&mut self, kind: u32, pointer: u32, place: &[u32]) -> u32 {
        let place = self.result(65, pointer, place);
        self.result(61, kind, &[place])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_instruction_has_the_length_that_it_says_and_names_are_within_the_bound() {
        let words = words();
        assert_eq!(words[0], 0x0723_0203);
        let mut rest = &words[5..];
        let mut last = 0;
        while let Some(&first) = rest.first() {
            let length = (first >> 16) as usize;
            assert!(length > 0 && length <= rest.len());
            last = first & 0xffff;
            rest = &rest[length..];
        }
        assert_eq!(last, 56, "it ends with the function");
    }
}
