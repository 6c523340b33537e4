"""LSTM and GRU against PyTorch's: states, and the gradients of input and weights, in fp32.

Run with -m parity.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

from lm import sharding
from lm.nn.blockwise import Tokens
from lm.nn.layers import Side
from lm.nn.recurrent import Gru, Lstm

torch = pytest.importorskip("torch", reason="parity needs the extra parity: torch")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # those of other people's packages
]

B, T, D, H = 3, 20, 8, 12
NAMES = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]


def made(kind):
    """Returns PyTorch's module, our mixer with its weights and no projection, and an input."""
    torch.manual_seed(0)
    theirs = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](D, H, batch_first=True)
    config = (
        Lstm.Config(hidden=H, forget=0.0) if kind == "lstm" else Gru.Config(hidden=H)
    )
    mixer = {"lstm": Lstm, "gru": Gru}[kind](config, D, 1.0, 1.0, nnx.Rngs(params=0))
    w_ih, w_hh, b_ih, b_hh = (getattr(theirs, n).detach().numpy() for n in NAMES)
    of_gates = lambda a: a.reshape(-1, H, *a.shape[1:]).swapaxes(1, -1)  # noqa: E731
    mixer.input_gdh[...] = of_gates(w_ih)
    mixer.recurrent_ghk[...] = of_gates(w_hh)
    b_ih, b_hh = b_ih.reshape(-1, H), b_hh.reshape(-1, H)
    both = b_ih + b_hh
    ours = both if kind == "lstm" else np.stack([both[0], both[1], b_hh[2], b_ih[2]])
    mixer.bias_ph[...] = ours
    x = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
    return theirs, mixer, x


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_states_and_gradients_are_those_of_pytorch(kind):
    with sharding.use(toy.layout(toy.BASE.mesh)):
        theirs, mixer, x = made(kind)
        mixer.out_hd[...] = jnp.eye(H)[:, :D]
        side = Side(Tokens(*(jnp.zeros((B, T), jnp.int32),) * 2))
        wanted = torch.from_numpy(x).requires_grad_()
        ys = theirs(wanted)[0][..., :D]
        (ys**2).sum().backward()

        def loss(mixer, x):
            y = mixer(x, side)[0]
            return (y**2).sum(), y

        run = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (_, y), (d_mixer, dx) = jax.jit(run)(mixer, jnp.asarray(x))
    np.testing.assert_allclose(y, ys.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, wanted.grad.numpy(), rtol=1e-4, atol=1e-5)
    for ours, name in (("input_gdh", NAMES[0]), ("recurrent_ghk", NAMES[1])):
        grad = getattr(theirs, name).grad.numpy()
        got = np.asarray(getattr(d_mixer, ours)[...]).swapaxes(1, 2).reshape(grad.shape)
        np.testing.assert_allclose(got, grad, rtol=1e-4, atol=1e-4)
    # The biases that the state's part of the gates has; an LSTM's two have one gradient.
    grad = theirs.bias_hh_l0.grad.numpy().reshape(-1, H)
    got = np.asarray(d_mixer.bias_ph[...])[: len(grad)]
    np.testing.assert_allclose(got, grad, rtol=1e-4, atol=1e-4)
