"""Index Backpropagation Quantization (arXiv 2412.02692): every code of the codebook receives a gradient at every step.

With logits l = z E^T / logit_temperature [N, K] of N tokens and K codes, p = softmax(l), q = softmax(l / temperature):

    z_q            = (onehot(i) - sg(p) + p) E,   i_n = argmax_k l_nk;   its value is E[i], its gradient goes through p
    sample_entropy = mean_n H(q_n)                                        how undecided a token is
    batch_entropy  = mean over groups of tokens of -sum_k a_k log(a_k + 1e-5),   a_k = mean of q_nk over the group

`soft_lookup` is the general form, in which code k has a key e_k and a value w_k of any width: the codebook E gives the
logits, and rows of V [K, W] are returned, (onehot(i) - sg(p) + p) V. So a loss on, say, a generator's embeddings of the
codes reaches the latents and the codebook (EOSTok, arXiv 2605.00503, section 3; GEAR, arXiv 2606.32039).

Two implementations give the same values, indices and gradients: "dense" is the formulas above, differentiated by JAX,
and holds several [N, K] arrays; "streamed" (`ibq_jax.ops.streamed`) holds none and splits the codes over devices.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import FULL, check_precision
from ibq_jax.base.sharding import platform
from ibq_jax.ops.block_scan import BlockScan, chunk_tokens, sizes_on_a_device
from ibq_jax.ops.exact_search import TOKENS_AT_ONCE, exact_nearest_codes
from ibq_jax.ops.streamed import LOG_EPSILON, streamed_lookup, streamed_nearest_codes

BLOCK_BYTES = 8 * 2**20
GPU_BLOCK_BYTES = 128 * 2**20  # every block launches a dozen kernels there (docs/speed.md)
MIN_NORM = 1e-12  # vectors are divided by at least this length


class SoftLookup(NamedTuple):
    """The result of `soft_lookup` for N tokens and values of W dimensions. Entropies are in nats.

    Gradients flow through value, sample_entropy and batch_entropy. The last two are diagnostics.
    """

    value: jax.Array  # [N, W] float32, exactly values[indices]
    indices: jax.Array  # [N] int32, the smallest one on a tie
    sample_entropy: jax.Array  # []
    batch_entropy: jax.Array  # []
    max_probability: jax.Array  # [] mean over tokens of the largest probability at temperature 1
    max_logit: jax.Array  # [] the largest |l|


class IndexBackprop(NamedTuple):
    """The result of `index_backprop` for N tokens of D dimensions: that of `soft_lookup`, whose value is `z_q`."""

    z_q: jax.Array  # [N, D] float32, exactly codebook[indices]
    indices: jax.Array
    sample_entropy: jax.Array
    batch_entropy: jax.Array
    max_probability: jax.Array
    max_logit: jax.Array

    @property
    def avg_entropy(self) -> jax.Array:
        """The batch entropy, under the name of the released code."""
        return self.batch_entropy


def index_backprop(
    z: jax.Array,
    codebook: jax.Array,
    *,
    entropy_temperature: float = 0.01,
    entropy_group_tokens: int = 0,
    logit_temperature: float = 1.0,
    precision: str = "float32",
    gradient_precision: str = "float32",
    block_size: int = 0,
    implementation: Literal["streamed", "dense"] = "streamed",
    mesh: Mesh | None = None,
) -> IndexBackprop:
    """Quantizes z [N, D] to rows of codebook [K, D]; differentiable in both.

    Inputs are float32 or bfloat16. bfloat16 inputs are multiplied without conversion, with float32 results; all other
    arithmetic is float32, and gradients have the inputs' types.

    Args:
      z: latents of N tokens, taken as they are: a caller may normalize them.
      codebook: K codes, likewise.
      entropy_temperature: divides the logits of q only.
      entropy_group_tokens: consecutive tokens whose probabilities are averaged before the batch entropy is computed;
        0 = all N. It is a property of the loss and independent of the number of devices. The streamed form keeps K
        numbers per group.
      logit_temperature: divides the logits of p and q, by way of z. Vectors of length one have logits within
        1 / logit_temperature.
      precision: of the logits of float32 inputs, a name from `ibq_jax.base.precision`, in the streamed form; the dense
        form is float32 always. The indices are those of the largest logits as computed.
      gradient_precision: the same for the other products of the streamed form, from which only gradients come.
      block_size: codes per block of the streamed form; it must divide the codes on one device. 0 chooses the largest
        size for which a float32 array [chunk, block_size] stays within 8 MiB (128 MiB on GPUs), or within 4 times the
        size of the chunk of z if that is more. A chunk is all tokens of a device, or as many whole entropy groups as
        make about 1,000 (8,000 on GPUs).
      implementation: "streamed", or "dense", which ignores block_size and leaves the mesh to the partitioner.
      mesh: None runs on one device (or as the partitioner decides). A mesh with the axes of `ibq_jax.base.sharding`
        splits tokens over all its axes and the codebook's rows over `codebook`.

    Returns:
      the quantized latents, their codes, the two entropies and diagnostics.

    Raises:
      UsageError: a size that does not divide, or an unknown implementation.
      ValueError: arrays of other shapes or types.
    """
    _check_positive("logit_temperature", logit_temperature)
    options = _Options(
        entropy_temperature, entropy_group_tokens, logit_temperature, (precision, gradient_precision), block_size, mesh
    )
    return IndexBackprop(*_lookup(z, codebook, None, options, implementation))


def soft_lookup(
    z: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    temperature: float = 1.0,
    l2_normalize: bool = False,
    entropy_temperature: float = 0.01,
    entropy_group_tokens: int = 0,
    precision: str = "float32",
    gradient_precision: str = "float32",
    block_size: int = 0,
    implementation: Literal["streamed", "dense"] = "streamed",
    mesh: Mesh | None = None,
) -> SoftLookup:
    """Looks up values[argmax_k z . keys_k], differentiable in all three arguments.

    With g = dL/dvalue [N, W], p = softmax(z keys^T / temperature) and mu_n = sum_k p_nk values_k, the gradient of the
    logits is p_nk (g_n . values_k - g_n . mu_n), as if the softmax's mean had been returned, and g_n is added to the
    gradient of the row of `values` that was chosen. `index_backprop` is the case in which the values are the keys.

    Args:
      z: [N, D], float32 or bfloat16.
      keys: [K, D], likewise.
      values: [K, W], likewise, W of any size. On a mesh, their rows are split like those of the keys.
      temperature: divides the logits of p, and those of the entropies.
      l2_normalize: divides z and keys by their lengths first, in float32.
      entropy_temperature: as in `index_backprop`, and so are all further arguments and the errors.

    Returns:
      the chosen values, their codes, the two entropies of the logits and diagnostics.
    """
    _check_positive("temperature", temperature)
    if values.ndim != 2 or values.shape[:1] != keys.shape[:1] or 0 in values.shape or not _has_dtype(values):
        raise ValueError(
            f"expected values [K, W] for keys [K, D], float32 or bfloat16; got {values.dtype} {values.shape} "
            f"for keys {keys.shape}"
        )
    if l2_normalize:
        z, keys = (unit(vectors.astype(jnp.float32)).astype(vectors.dtype) for vectors in (z, keys))
    options = _Options(
        entropy_temperature, entropy_group_tokens, temperature, (precision, gradient_precision), block_size, mesh
    )
    return SoftLookup(*_lookup(z, keys, values, options, implementation))


def unit(vectors: jax.Array) -> jax.Array:
    """Divides vectors [..., D] by their lengths."""
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, MIN_NORM**2))


def nearest_codes(
    z: jax.Array, codebook: jax.Array, *, precision: str = "float32", block_size: int = 0, mesh: Mesh | None = None
) -> jax.Array:
    """Returns for each token the code with the largest dot product, [N] int32; on a tie the smallest index.

    With "float32" it is the largest product of the numbers given, on every machine (`ibq_jax.ops.exact_search`). With a
    lower `precision` it is the largest product as computed at that precision. Other arguments and errors are those of
    `index_backprop`.
    """
    _check_arrays(z, codebook)
    check_precision(precision, "precision")
    if precision == "float32":
        # Twice the tokens, because next to a block's products its running maxima are held.
        stream = _stream(z, codebook, block_size, mesh, lambda tokens: 2 * min(tokens, TOKENS_AT_ONCE))
        return exact_nearest_codes(z, codebook, stream, "float32" if platform(mesh) == "cpu" else "bfloat16")
    stream = _stream(z, codebook, block_size, mesh, lambda tokens: tokens)
    return streamed_nearest_codes(z, codebook, stream, precision)


@dataclass(frozen=True)
class _Options:
    """The arguments that both lookups share, under the names of `index_backprop`."""

    entropy_temperature: float
    entropy_group_tokens: int
    logit_temperature: float
    precisions: tuple[str, str]  # of the logits and of the other products
    block_size: int
    mesh: Mesh | None


def _lookup(
    z: jax.Array, keys: jax.Array, values: jax.Array | None, options: _Options, implementation: str
) -> tuple[jax.Array, ...]:
    """Returns the fields of `SoftLookup` in order; `values` are None if they are the keys."""
    _check_arrays(z, keys)
    tokens = z.shape[0]
    group_tokens = options.entropy_group_tokens or tokens
    if group_tokens < 0 or tokens % group_tokens:
        raise UsageError(
            f"entropy_group_tokens={group_tokens} does not divide the {tokens} tokens of a batch; "
            f"near divisors: {_near_divisors(tokens, group_tokens)} (0 = the whole batch is one group)"
        )
    for name, precision in zip(("precision", "gradient_precision"), options.precisions, strict=True):
        check_precision(precision, name)
    temperature = options.entropy_temperature
    _check_positive("entropy_temperature", temperature)
    if options.logit_temperature != 1:
        z = (z.astype(jnp.float32) / options.logit_temperature).astype(z.dtype)
    if implementation == "dense":
        return _dense(z, keys, keys if values is None else values, temperature, group_tokens)
    if implementation != "streamed":
        raise UsageError(f"implementation={implementation!r} does not exist; it is 'streamed' or 'dense'")
    stream = _stream(
        z, keys, options.block_size, options.mesh, partial(chunk_tokens, group_tokens=group_tokens, mesh=options.mesh)
    )
    return streamed_lookup(z, keys, values, temperature, group_tokens, options.precisions, stream)


def _dense(
    z: jax.Array, keys: jax.Array, values: jax.Array, temperature: float, group_tokens: int
) -> tuple[jax.Array, ...]:
    z, keys, values = (array.astype(jnp.float32) for array in (z, keys, values))
    logits = jnp.einsum("nd,kd->nk", z, keys, precision=FULL)
    indices = jnp.argmax(logits, axis=1).astype(jnp.int32)
    p = jax.nn.softmax(logits)
    no_gradient = lax.stop_gradient((p, values))
    soft = jnp.einsum("nk,kd->nd", p - no_gradient[0], no_gradient[1], precision=FULL)  # zero, with p's gradient
    log_q = jax.nn.log_softmax(logits / temperature)
    q = jnp.exp(log_q)
    a = q.reshape(-1, group_tokens, q.shape[1]).mean(axis=1)
    return SoftLookup(
        value=values[indices] + soft,
        indices=indices,
        sample_entropy=-(q * log_q).sum(axis=1).mean(),
        batch_entropy=-(a * jnp.log(a + LOG_EPSILON)).sum(axis=1).mean(),
        max_probability=lax.stop_gradient(p.max(axis=1).mean()),
        max_logit=lax.stop_gradient(jnp.abs(logits).max()),
    )


def _check_arrays(z: jax.Array, codebook: jax.Array) -> None:
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1] or 0 in z.shape + codebook.shape:
        raise ValueError(f"expected z [N, D] and codebook [K, D], none of them empty; got {z.shape}, {codebook.shape}")
    if not _has_dtype(z) or not _has_dtype(codebook):
        raise ValueError(f"expected float32 or bfloat16, got z {z.dtype} and codebook {codebook.dtype}")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UsageError(f"{name}={value} must be positive")


def _has_dtype(array: jax.Array) -> bool:
    return array.dtype in (jnp.float32, jnp.bfloat16)


def _stream(
    z: jax.Array, codebook: jax.Array, block_size: int, mesh: Mesh | None, at_once: Callable[[int], int]
) -> BlockScan:
    """Returns the scan with its block size; `at_once` tells how many of a device's tokens a block is used for at once.

    Raises UsageError if the sizes do not divide.
    """
    (tokens, width), codes = z.shape, codebook.shape[0]
    tokens, codes = sizes_on_a_device(tokens, codes, mesh, f"a codebook of {codes} codes")
    if block_size == 0:
        budget = GPU_BLOCK_BYTES if platform(mesh) == "gpu" else BLOCK_BYTES
        most = max(budget // (4 * at_once(tokens)), 4 * width)
        block_size = max(size for size in _divisors(codes) if size <= most)
    if block_size < 0 or codes % block_size:
        raise UsageError(
            f"block_size={block_size} does not divide the {codes} codes of a device; "
            f"near divisors: {_near_divisors(codes, block_size)} (0 = chosen for you)"
        )
    return BlockScan(block_size, mesh)


def _divisors(number: int) -> Iterable[int]:
    return (divisor for divisor in range(1, number + 1) if number % divisor == 0)


def _near_divisors(number: int, target: int) -> str:
    nearest = sorted(_divisors(number), key=lambda divisor: abs(divisor - target))[:2]
    return ", ".join(map(str, sorted(nearest)))
