"""Attention by inference engines, as peers: OpenVINO and ONNX Runtime. Both are optional and imported when asked for.

Their graphs are built and compiled beforehand, for the sizes of the case; a timed call is the inference alone, on
tensors that share memory with PyTorch's. Where there are several ways to write the graph, each is tried on the real
inputs and the fastest is timed (registry.fastest).
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .registry import Run, Unavailable, fastest, import_peers

OPSET = 23  # of ONNX: the first with Attention
IR_VERSION = 10


@dataclass(frozen=True)
class Problem:
    """softmax(D^-0.5 q k^T where allowed) v: q (B, H, S, D), k, v (B, Hkv, T, D), contiguous; allowed (1 or B, 1, S,
    T), or None for causal (S == T) or no masking."""

    name: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    causal: bool
    allowed: torch.Tensor | None

    @property
    def key(self) -> tuple[Any, ...]:
        """Of what a choice between graphs may depend on."""
        return self.name, self.q.shape, self.k.shape, self.q.dtype, torch.get_num_threads()

    @property
    def groups(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def masks(self) -> dict[str, torch.Tensor | None]:
        """The ways to say what is allowed, made beforehand; none where the engine needs no tensor for it."""
        if self.allowed is None and not self.causal:
            return {"": None}
        S, T = self.q.shape[2], self.k.shape[2]
        allowed = torch.ones(1, 1, S, T, dtype=torch.bool).tril() if self.allowed is None else self.allowed
        additive = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf).to(self.q.dtype)
        return {**({"": None} if self.causal else {", boolean mask": allowed}), ", additive mask": additive}


@dataclass(frozen=True)
class _Inference:
    """A call of an engine, which writes `out`, and the tensors that must live as long: engines hold bare addresses."""

    infer: Callable[[], object]
    out: torch.Tensor
    kept: Mapping[str, torch.Tensor]

    def __call__(self) -> dict[str, torch.Tensor]:
        self.infer()
        return {"out": self.out}


def openvino(problem: Problem) -> Run:
    """ScaledDotProductAttention, or the products and softmax it stands for, with each performance hint."""
    (ov,) = import_peers("openvino")
    ops = importlib.import_module("openvino.opset13")
    candidates: dict[str, Callable[[], Run]] = {}
    for (mask_name, mask), hint in itertools.product(problem.masks().items(), ("LATENCY", "THROUGHPUT")):
        graphs = {"ScaledDotProductAttention": _ov_attention}
        if mask is not None or not problem.causal:
            graphs["MatMul, Softmax, MatMul"] = _ov_products
        if problem.groups > 1 and not problem.causal and mask is None:
            graphs = {f"{name}, folded groups": graph for name, graph in graphs.items()} | graphs
        for name, graph in graphs.items():
            options = {
                "PERFORMANCE_HINT": hint,
                # By default fp32 inputs would be rounded to bf16 where there is bf16 arithmetic; so, it seems, is fp16
                # under the hint f16: wrong by check.py in five of the six shapes of test_benchmark_peers.py.
                "INFERENCE_PRECISION_HINT": "bf16" if problem.q.dtype == torch.bfloat16 else "f32",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "ENABLE_CPU_PINNING": False,  # as for the others, and what is pinned would stay so beside them
            }
            candidates[f"{name}{mask_name}, {hint}"] = _ov_candidate(
                ov, ops, problem, graph, mask, options, "folded" in name
            )
    return fastest(("OpenVINO", *problem.key), candidates)


def _ov_candidate(
    ov: Any,
    ops: Any,
    problem: Problem,
    graph: Callable[..., Any],
    mask: torch.Tensor | None,
    options: Any,
    folded: bool,
) -> Callable[[], Run]:
    def make() -> Run:
        given = {"q": problem.q, "k": problem.k, "v": problem.v}
        if folded:
            B, H, S, D = problem.q.shape
            given["q"] = problem.q.view(B, H // problem.groups, problem.groups * S, D)
        if mask is not None:
            given["mask"] = mask
        out = torch.empty_like(given["q"])
        parameters = {name: ops.parameter(list(x.shape), _ov_type(ov, x.dtype)) for name, x in given.items()}
        operands = dict(parameters)
        if problem.groups > 1 and not folded:
            operands |= {name: _ov_repeat(ov, ops, operands[name], given[name], problem.groups) for name in ("k", "v")}
        model = ov.Model([graph(ov, ops, problem, operands)], list(parameters.values()), "attention")
        request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
        for i, x in enumerate(given.values()):
            request.set_input_tensor(i, _ov_tensor(ov, x))
        request.set_output_tensor(0, _ov_tensor(ov, out))
        return _Inference(request.infer, out.view(problem.q.shape), given)

    return make


def _ov_type(ov: Any, dtype: torch.dtype) -> Any:
    return {
        torch.float32: ov.Type.f32,
        torch.bfloat16: ov.Type.bf16,
        torch.float16: ov.Type.f16,
        torch.bool: ov.Type.boolean,
    }[dtype]


def _ov_tensor(ov: Any, x: torch.Tensor) -> Any:
    """On the same memory."""
    if x.dtype == torch.bfloat16:  # which numpy does not know
        return ov.Tensor(x.view(torch.int16).numpy(), ov.Shape(list(x.shape)), ov.Type.bf16)
    return ov.Tensor(x.numpy(), shared_memory=True)


def _ov_repeat(ov: Any, ops: Any, operand: Any, x: torch.Tensor, groups: int) -> Any:
    """A key head for every query head; the compiler sees the broadcast."""
    B, Hkv, T, D = x.shape
    wide = ops.unsqueeze(operand, ops.constant(np.array([2]), ov.Type.i64))
    wide = ops.broadcast(wide, ops.constant(np.array([B, Hkv, groups, T, D]), ov.Type.i64))
    shape = ops.constant(np.array([B, Hkv * groups, T, D]), ov.Type.i64)
    return ops.reshape(wide, shape, special_zero=False)


def _ov_attention(ov: Any, ops: Any, problem: Problem, operands: Mapping[str, Any]) -> Any:
    return ops.scaled_dot_product_attention(*operands.values(), causal=problem.causal and "mask" not in operands)


def _ov_products(ov: Any, ops: Any, problem: Problem, operands: Mapping[str, Any]) -> Any:
    q_type = _ov_type(ov, problem.q.dtype)
    scale = ops.constant(np.array(problem.q.shape[-1] ** -0.5, dtype=np.float32))
    scores = ops.multiply(
        ops.matmul(operands["q"], operands["k"], False, True), ops.convert(scale, q_type.get_type_name())
    )
    if "mask" in operands:
        mask = operands["mask"]
        if mask.get_element_type() == ov.Type.boolean:
            never = ops.convert(ops.constant(np.array(-np.inf, dtype=np.float32)), q_type.get_type_name())
            scores = ops.select(mask, scores, never)
        else:
            scores = ops.add(scores, mask)
    return ops.matmul(ops.softmax(scores, -1), operands["v"], False, False)


def onnxruntime(problem: Problem) -> Run:
    """com.microsoft MultiHeadAttention and GroupQueryAttention where they apply, and ONNX's own Attention."""
    ort, onnx = import_peers("onnxruntime", "onnx")
    if problem.q.dtype == torch.bfloat16:
        raise Unavailable("ONNX Runtime's kernels for a CPU take fp32 and fp16, not bf16")
    B, H, S, _ = problem.q.shape
    T = problem.k.shape[2]
    rows = {name: x.transpose(1, 2).reshape(B, x.shape[2], -1) for name, x in _qkv(problem).items()}
    candidates: dict[str, Callable[[], Run]] = {}
    for mask_name, mask in problem.masks().items():
        masks = {} if mask is None else {"mask": mask}
        candidates[f"Attention{mask_name}"] = _ort_candidate(
            ort,
            onnx,
            problem,
            "Attention",
            "",
            {**_qkv(problem), **masks},
            {"is_causal": int(problem.causal and mask is None)},
        )
    if problem.allowed is None and problem.groups == 1:
        attributes = {"num_heads": H, "unidirectional": int(problem.causal)}
        candidates["MultiHeadAttention"] = _ort_candidate(
            ort, onnx, problem, "MultiHeadAttention", "com.microsoft", rows, attributes
        )
    if problem.allowed is None and S == 1:
        # A decoding step: the newest key and value go where they stand already, the rest are in the cache.
        cached = {
            "q": rows["q"],
            "k": rows["k"][:, -1:].contiguous(),
            "v": rows["v"][:, -1:].contiguous(),
            "past_k": problem.k,
            "past_v": problem.v,
            "last": torch.full((B,), T - 1, dtype=torch.int32),
            "total": torch.tensor([T], dtype=torch.int32),
        }
        candidates["GroupQueryAttention"] = _ort_candidate(
            ort,
            onnx,
            problem,
            "GroupQueryAttention",
            "com.microsoft",
            cached,
            {"num_heads": H, "kv_num_heads": problem.k.shape[1]},
            {"present_k": problem.k, "present_v": problem.v},
        )
    return fastest(("ONNX Runtime", *problem.key), candidates)


def _qkv(problem: Problem) -> dict[str, torch.Tensor]:
    return {"q": problem.q, "k": problem.k, "v": problem.v}


def _ort_candidate(
    ort: Any,
    onnx: Any,
    problem: Problem,
    op: str,
    domain: str,
    given: Mapping[str, torch.Tensor],
    attributes: Mapping[str, int],
    also_written: Mapping[str, torch.Tensor] | None = None,
) -> Callable[[], Run]:
    types = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.bool: onnx.TensorProto.BOOL,
        torch.int32: onnx.TensorProto.INT32,
    }

    def info(name: str, x: torch.Tensor) -> Any:
        return onnx.helper.make_tensor_value_info(name, types[x.dtype], list(x.shape))

    def make() -> Run:
        B, H, S, D = problem.q.shape
        by_rows = domain == "com.microsoft"  # (B, S, H D)
        out = torch.empty((B, S, H * D) if by_rows else (B, H, S, D), dtype=problem.q.dtype)
        written = {"out": out, **(also_written or {})}
        node = onnx.helper.make_node(op, list(given), list(written), domain=domain, **attributes)
        graph = onnx.helper.make_graph(
            [node],
            "attention",
            [info(name, x) for name, x in given.items()],
            [info(name, x) for name, x in written.items()],
        )
        opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        # Threads that spin while they wait would take a core from the contender and from the probe that follow.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except (state.NotImplemented, state.InvalidGraph, state.Fail) as error:  # none is a RuntimeError
            raise RuntimeError(f"ONNX Runtime refuses {op}: {error}") from None
        binding = session.io_binding()
        for name, x in given.items():
            binding.bind_input(name, "cpu", 0, types[x.dtype], list(x.shape), x.data_ptr())
        for name, x in written.items():
            binding.bind_output(name, "cpu", 0, types[x.dtype], list(x.shape), x.data_ptr())
        return _Inference(
            lambda: session.run_with_iobinding(binding),
            out.view(B, S, H, D).transpose(1, 2) if by_rows else out,
            {**given, **written},
        )

    return make
