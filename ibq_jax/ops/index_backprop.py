"""Index Backpropagation Quantization (arXiv 2412.02692): every code of the codebook receives a gradient at every step.

With logits l = z E^T / logit_temperature [N, K] of N tokens and K codes, p = softmax(l), q = softmax(l / temperature):

    z_q            = (onehot(i) - sg(p) + p) E,   i_n = argmax_k l_nk;   its value is E[i], its gradient goes through p
    sample_entropy = mean_n H(q_n)                                        how undecided a token is
    batch_entropy  = mean over groups of tokens of -sum_k a_k log(a_k + 1e-5),   a_k = mean of q_nk over the group

Two implementations give the same values, indices and gradients: "dense" is the formulas above, differentiated by JAX,
and holds several [N, K] arrays; "streamed" (`ibq_jax.ops.streamed`) holds none and splits the codebook over devices.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import FULL, check_precision
from ibq_jax.base.sharding import platform
from ibq_jax.ops.block_scan import BlockScan, sizes_on_a_device
from ibq_jax.ops.exact_search import TOKENS_AT_ONCE, exact_nearest_codes
from ibq_jax.ops.streamed import LOG_EPSILON, chunk_tokens, streamed_nearest_codes, streamed_quantize

BLOCK_BYTES = 8 * 2**20
GPU_BLOCK_BYTES = 128 * 2**20  # every block launches a dozen kernels there (docs/speed.md)


class IndexBackprop(NamedTuple):
    """The result of `index_backprop` for N tokens of D dimensions. Entropies are in nats.

    Gradients flow through z_q, sample_entropy and batch_entropy. The last two fields are diagnostics without gradient.
    """

    z_q: jax.Array  # [N, D] float32, exactly codebook[indices]
    indices: jax.Array  # [N] int32, the smallest one on a tie
    sample_entropy: jax.Array  # []
    batch_entropy: jax.Array  # []
    max_probability: jax.Array  # [] mean over tokens of the largest probability at temperature 1
    max_logit: jax.Array  # [] the largest |l|

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
        make about 1,000.
      implementation: "streamed", or "dense", which ignores block_size and leaves the mesh to the partitioner.
      mesh: None runs on one device (or as the partitioner decides). A mesh with the axes of `ibq_jax.base.sharding`
        splits tokens over all its axes and the codebook's rows over `codebook`.

    Returns:
      the quantized latents, their codes, the two entropies and diagnostics.

    Raises:
      UsageError: a size that does not divide, or an unknown implementation.
      ValueError: arrays of other shapes or types.
    """
    _check_arrays(z, codebook)
    tokens = z.shape[0]
    group_tokens = entropy_group_tokens or tokens
    if group_tokens < 0 or tokens % group_tokens:
        raise UsageError(
            f"entropy_group_tokens={group_tokens} does not divide the {tokens} tokens of a batch; "
            f"near divisors: {_near_divisors(tokens, group_tokens)} (0 = the whole batch is one group)"
        )
    check_precision(precision, "precision")
    check_precision(gradient_precision, "gradient_precision")
    for name, value in (("entropy_temperature", entropy_temperature), ("logit_temperature", logit_temperature)):
        if not value > 0:
            raise UsageError(f"{name}={value} must be positive")
    if logit_temperature != 1:
        z = (z.astype(jnp.float32) / logit_temperature).astype(z.dtype)
    if implementation == "dense":
        return _dense(z, codebook, entropy_temperature, group_tokens)
    if implementation != "streamed":
        raise UsageError(f"implementation={implementation!r} does not exist; it is 'streamed' or 'dense'")
    stream = _stream(z, codebook, block_size, mesh, partial(chunk_tokens, group_tokens=group_tokens))
    precisions = precision, gradient_precision
    return IndexBackprop(*streamed_quantize(z, codebook, entropy_temperature, group_tokens, precisions, stream))


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


def _dense(z: jax.Array, codebook: jax.Array, temperature: float, group_tokens: int) -> IndexBackprop:
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    logits = jnp.einsum("nd,kd->nk", z, codebook, precision=FULL)
    indices = jnp.argmax(logits, axis=1).astype(jnp.int32)
    p = jax.nn.softmax(logits)
    no_gradient = lax.stop_gradient((p, codebook))
    soft = jnp.einsum("nk,kd->nd", p - no_gradient[0], no_gradient[1], precision=FULL)  # zero, with p's gradient
    log_q = jax.nn.log_softmax(logits / temperature)
    q = jnp.exp(log_q)
    a = q.reshape(-1, group_tokens, q.shape[1]).mean(axis=1)
    return IndexBackprop(
        z_q=codebook[indices] + soft,
        indices=indices,
        sample_entropy=-(q * log_q).sum(axis=1).mean(),
        batch_entropy=-(a * jnp.log(a + LOG_EPSILON)).sum(axis=1).mean(),
        max_probability=lax.stop_gradient(p.max(axis=1).mean()),
        max_logit=lax.stop_gradient(jnp.abs(logits).max()),
    )


def _check_arrays(z: jax.Array, codebook: jax.Array) -> None:
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1] or 0 in z.shape + codebook.shape:
        raise ValueError(f"expected z [N, D] and codebook [K, D], none of them empty; got {z.shape}, {codebook.shape}")
    if not {z.dtype, codebook.dtype} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        raise ValueError(f"expected float32 or bfloat16, got z {z.dtype} and codebook {codebook.dtype}")


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
