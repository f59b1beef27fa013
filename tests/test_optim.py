"""Low-precision optimizers against formulas in NumPy, and in combination with optax."""

import fractions
import inspect
import io
import math

import chex
import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

import jaxq
from jaxq import optim
from jaxq.optim import Flattened, Squared
from tests import data
from tests.oracle import assert_same, assert_same_trees

BLOCK = 256
STOCHASTIC = jaxq.Recipe("int8", jaxq.PerBlock(64), rounding="stochastic")


@pytest.fixture(autouse=True)
def _promotion():
    """Allows dtype promotion, because optax multiplies floats by integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def parameters() -> dict:
    return {"w": data.normal((70, 77)), "b": data.normal((77,), 1)}


def gradients(step: int, params: dict | None = None) -> dict:
    rng = np.random.default_rng(step + 1)
    scale = np.float32(10.0 ** rng.integers(-3, 1))
    return jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal(p.shape).astype(np.float32) ** 3 * scale),
        parameters() if params is None else params,
    )


def quantized_arrays(state) -> list:
    """Returns the quantized arrays of a state."""
    kinds = jaxq.Quantized | Flattened | Squared
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


class TestQuantizedState:
    @staticmethod
    def quantized(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns codes, scales and values: the nearest level to x / absmax in float64."""
        levels = np.array(jaxq.get_format(name).levels)
        blocks = np.pad(x.ravel(), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
        scale = np.abs(blocks).max(1)
        units = blocks / np.where(scale == 0, np.float32(1), scale)[:, None]
        distance = np.abs(units.astype(np.float64)[..., None] - levels)
        codes = distance.argmin(-1).astype(np.uint8)  # A tie gives the lower level.
        if name == "udynamic8":  # A positive value does not become 0.
            codes[(codes == 0) & (blocks > 0)] = 1
        values = levels.astype(np.float32)[codes] * scale[:, None]
        return codes.ravel()[: x.size], scale, values.ravel()[: x.size].reshape(x.shape)

    def test_adam_matches_numpy(self):
        """Compares codes and scales bitwise over several steps, and updates up to rounding."""
        params = parameters()
        tx = optim.quantize_state(optax.adam(1e-2, b1=0.9, b2=0.999))
        state = tx.init(params)
        f = np.float32
        m = v = np.zeros((70, 77), f)
        for step in range(4):
            g = gradients(step)
            updates, state = tx.update(g, state)
            g = np.asarray(g["w"])
            m, v = f(1 - 0.9) * g + f(0.9) * m, f(1 - 0.999) * (g * g) + f(0.999) * v
            t = step + 1
            m_hat, v_hat = m / f(1 - 0.9**t), v / f(1 - 0.999**t)
            want = -1e-2 * m_hat / (np.sqrt(v_hat) + 1e-8)
            np.testing.assert_allclose(updates["w"], want, rtol=2e-5)
            root, adam = np.sqrt(v), state.inner[0]
            m_row, root_row = adam.mu["w"].row, adam.nu["w"].root.row
            for q, exact, name in ((m_row, m, "dynamic8"), (root_row, root, "udynamic8")):
                codes, scale, _ = self.quantized(exact, name)
                np.testing.assert_array_equal(q.codes, codes)
                np.testing.assert_array_equal(q.scale, scale)
            m, v = self.quantized(m, "dynamic8")[2], self.quantized(root, "udynamic8")[2] ** 2
        assert isinstance(state.inner[0].mu["b"], jax.Array)

    def test_moments_stay_close_to_float32_adam(self):
        """Checks that the errors of the moments stay below an accumulated bound.

        Rounding to `dynamic8` has an error of at most h A, with h = 0.0140625 / 2 and the largest
        magnitude A of the block. An error e thus grows to at most b e + h A in one step with decay
        b. For `udynamic8` h is half as large and applies to the square root, so that the error of
        the square is at most (2 h + h^2) A.
        """
        params = parameters()
        adam, tx = optax.adam(1e-3), optim.quantize_state(optax.adam(1e-3))
        plain, small = adam.init(params), tx.init(params)
        step = jax.jit(lambda g, plain, small: (adam.update(g, plain)[1], tx.update(g, small)[1]))
        bound = {"mu": 0.0, "nu": 0.0}
        for i in range(25):
            plain, small = step(gradients(i), plain, small)
            for name, decay, h in (("mu", 0.9, 0.00703126), ("nu", 0.999, 0.00704362)):
                q = getattr(small.inner[0], name)["w"]
                scale = q.row.scale if name == "mu" else q.root.row.scale**2
                largest = np.repeat(np.asarray(scale), BLOCK)[: 70 * 77].reshape(70, 77)
                bound[name] = decay * bound[name] + (h + 1e-6) * largest
                exact = np.asarray(getattr(plain[0], name)["w"])
                error = np.abs(np.asarray(q.dequantize()) - exact)
                assert (error <= bound[name]).all()
                if i == 0:
                    assert (error / bound[name]).max() > 0.75, "the bound must be tight"

    @pytest.mark.slow  # The neighboring tests check the same numbers by bounds.
    def test_final_loss_is_close_to_float32_adam(self):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((128, 64)) * 10.0 ** -rng.uniform(0, 1, 64), "f4")
        y = x @ jnp.asarray(rng.standard_normal((64, 64)), "f4")

        def final(tx) -> float:
            def step(carry, _):
                w, state = carry
                loss, g = jax.value_and_grad(lambda w: ((x @ w - y) ** 2).mean())(w)
                updates, state = tx.update(g, state)
                return (optax.apply_updates(w, updates), state), loss

            w = jnp.zeros((64, 64))
            return float(jax.lax.scan(step, (w, tx.init(w)), length=100)[1][-1])

        adam = optax.adam(2e-2)
        base = final(adam)
        assert base < 0.05 * float((y**2).mean())
        assert final(optim.quantize_state(adam)) < 1.1 * base
        linear = jaxq.Recipe("int8", jaxq.PerBlock(BLOCK))
        assert final(optim.quantize_state(adam, linear)) < 2 * base
        unprotected = optim.quantize_state(adam, linear, second_moments=None)
        assert not final(unprotected) < 10 * base, (
            "second moments rounded to 0 must prevent learning"
        )

    @staticmethod
    def largest_update(tx, gradients: np.ndarray) -> float:
        """Returns the largest update of zero parameters for given gradients of each step."""

        def run(gradients):
            params = jnp.zeros(gradients.shape[1:])

            def step(carry, g):
                state, largest = carry
                updates, state = tx.update(g, state, params)
                return (state, jnp.maximum(largest, jnp.abs(updates).max())), None

            return jax.lax.scan(step, (tx.init(params), 0.0), gradients)[0][1]

        return float(jax.jit(run)(jnp.asarray(gradients, jnp.float32)))

    @pytest.mark.parametrize(
        "recipe",
        [
            optim.ADAM8BIT,
            *(data.slow(jaxq.Recipe(name, jaxq.PerBlock(BLOCK))) for name in ("int8", "int4")),
            data.slow(jaxq.Recipe("float8_e4m3fn", jaxq.PerBlock(BLOCK))),
            jaxq.Recipe("float4_e2m1fn", jaxq.PerBlock(32), jaxq.MX()),
        ],
        ids=["default", "int8", "int4", "float8", "mxfp4"],
    )
    def test_adversarial_gradients_give_bounded_updates(self, recipe):
        """Checks that updates stay below four times the bound of float32 Adam.

        That bound is (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) = 7.3. Blocks contain gradients of
        very different sizes that stop, start, grow, shrink or are rarely nonzero.
        """
        rng, steps = np.random.default_rng(0), 120
        t = np.arange(steps)[:, None]
        sizes = 10.0 ** rng.uniform(-9, 0, BLOCK)
        signs = rng.choice([-1, 1], (steps, BLOCK))
        walk = 10.0 ** np.cumsum(rng.uniform(-0.3, 0.35, (steps, BLOCK)), 0)
        blocks = [
            sizes * ((t < 20) | (sizes == sizes.max())),
            sizes * (rng.random((steps, BLOCK)) < 0.05),
            np.where((t % 40 < 20) | (sizes == sizes.max()), sizes * 1.35**t, 0),
            sizes * signs * 0.8**t,
            10.0 ** rng.uniform(-9, 0, (steps, BLOCK)) * signs,
            walk * rng.choice([0, 1], (steps, BLOCK)),
            np.where((t == 50) & (sizes == sizes.max()), 1e6, sizes),
        ]
        gradients = np.clip(np.concatenate(blocks, 1), -1e15, 1e15)
        adam = optax.adam(1.0, eps=1e-30)
        assert self.largest_update(adam, gradients) < 7.3
        assert self.largest_update(optim.quantize_state(adam, recipe, min_size=0), gradients) < 30

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "tx",
        [
            optax.adamw(1.0),
            data.slow(optax.nadam(1.0)),
            optax.amsgrad(1.0),
            data.slow(optax.adamax(1.0)),
            data.slow(optax.adabelief(1.0)),
            data.slow(optax.adan(1.0)),
            data.slow(optax.rmsprop(1.0, momentum=0.9)),
        ],
        ids=["adamw", "nadam", "amsgrad", "adamax", "adabelief", "adan", "rmsprop"],
    )
    def test_stopped_gradients_give_bounded_updates(self, tx):
        sizes = 10.0 ** np.random.default_rng(0).uniform(-9, 0, BLOCK)
        gradients = np.where((np.arange(30)[:, None] < 5) | (sizes == sizes.max()), sizes, 0)
        small = optim.quantize_state(tx, min_size=0)
        assert self.largest_update(small, gradients) < 4 * self.largest_update(tx, gradients)

    def test_state_takes_one_byte_per_element_and_scales(self):
        init = optim.quantize_state(optax.adam(1e-3)).init
        state = jax.eval_shape(init, parameters())
        n = 70 * 77
        moment = n + 4 * math.ceil(n / BLOCK)
        sizes = (leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert sum(sizes) == 4 + 2 * moment + 2 * 4 * 77
        report = {row.path: row for row in jaxq.tree_report(state).rows}
        assert report["inner/0/nu/w/root/row"].bytes_after == moment
        big = jax.eval_shape(init, jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
        row = jaxq.tree_report(big).rows[-1]
        assert row.bytes_after / row.bytes_before == pytest.approx((1 + 4 / 256) / 4, rel=1e-6)

    @pytest.mark.parametrize(
        ("tx", "arrays"),
        [
            (optax.sgd(1e-2, momentum=0.9), 1),
            data.slow(optax.lion(1e-3), 1),
            data.slow(optax.rmsprop(1e-3), 1),
            data.slow(optax.adagrad(1e-3), 1),
            data.slow(optax.adamax(1e-3), 2),
            (optax.amsgrad(1e-3), 3),
            data.slow(optax.adabelief(1e-3), 2),
            data.slow(optax.lamb(1e-3, weight_decay=0.1), 2),
            (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 2),
            data.slow(optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), 2),
            (optax.masked(optax.adam(1e-3), {"w": True, "b": False}), 2),
            (optax.apply_if_finite(optax.adam(1e-3), 3), 2),
            (optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(), 3),
            (
                optax.partition({"a": optax.adam(1e-3), "b": optax.sgd(1.0)}, {"w": "a", "b": "b"}),
                2,
            ),
            (optax.sgd(1e-2), 0),
        ],
    )
    def test_wraps_any_optimizer(self, tx, arrays: int):
        """Checks that a 16-bit state changes updates little and keeps its tree structure."""
        params = parameters()
        recipe = jaxq.Recipe("float16", jaxq.PerBlock(32))
        small = optim.quantize_state(tx, recipe)
        state, plain = small.init(params), tx.init(params)
        assert len(quantized_arrays(state)) == arrays
        later = jax.eval_shape(lambda s: small.update(params, s, params)[1], state)
        chex.assert_trees_all_equal_structs(later, state)
        for i in range(2):
            updates, state = small.update(gradients(i), state, params)
            want, plain = tx.update(gradients(i), plain, params)
            for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(want), strict=True):
                error = np.abs(np.asarray(a) - np.asarray(b)).mean()
                assert error <= 2e-3 * np.abs(np.asarray(b)).mean()

    @pytest.mark.slow
    def test_state_nests_in_optax_wrappers(self):
        params = parameters()
        inner = optim.quantize_state(optax.adam(1e-3), min_size=0)
        masked = optax.chain(optax.clip(1.0), optax.masked(inner, {"w": True, "b": False}))
        state = masked.init(params)
        updates, state = jax.jit(masked.update)(gradients(0), state, params)
        assert_same(updates["b"], jnp.clip(gradients(0)["b"], -1, 1))
        assert len(quantized_arrays(state)) == 2
        parts = optax.partition({"a": inner, "b": optax.sgd(1.0)}, {"w": "a", "b": "b"})
        updates, _ = parts.update(gradients(0), parts.init(params), params)
        assert_same(updates["b"], -gradients(0)["b"])
        rate = optax.inject_hyperparams(
            lambda learning_rate: optim.quantize_state(optax.adam(learning_rate))
        )(learning_rate=1e-3)
        state = rate.init(params)
        state.hyperparams["learning_rate"] = jnp.asarray(0.0)
        assert (np.asarray(rate.update(gradients(0), state)[0]["w"]) == 0).all()

    def test_other_arrays_are_not_quantized(self):
        """Checks that learning rates and counts are not quantized."""
        tx = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
        init = optim.quantize_state(tx, "int8_tensor", min_size=0).init
        state = jax.eval_shape(init, parameters())
        assert len(quantized_arrays(state)) == 4
        assert isinstance(state.inner.hyperparams["learning_rate"], jax.ShapeDtypeStruct)

    def test_rules_match_paths_of_the_state(self):
        params = dict.fromkeys(("nu", "w", "x"), jax.ShapeDtypeStruct((64, 64), jnp.float32))
        init = lambda *args: jax.eval_shape(optim.quantize_state(*args).init, params)
        state = init(optax.chain(optax.adam(1e-3)))
        adam = state.inner[0][0]
        assert adam.mu["nu"].recipe.element.name == "dynamic8", (
            "the parameter named nu is not a second moment"
        )
        assert adam.nu["nu"].recipe.element.name == "udynamic8"
        madgrad = init(optax.contrib.madgrad(1e-3)).inner[-1]
        assert madgrad.grad_sum_sq["w"].recipe.element.name == "udynamic8"
        whole = optim.quantize_state(optax.adam(1e-3))
        bare = jax.eval_shape(whole.init, params["w"]).inner[0]
        assert bare.nu.recipe.element.name == "udynamic8"
        token = jaxq.Recipe("int8", jaxq.PerToken())
        rules = [("/w", None), ("nu/", jaxq.Recipe("udynamic8")), ("mu/", token)]
        state = init(optax.adam(1e-3), rules)
        chex.assert_shape(state.inner[0].mu["w"], (64, 64))
        chex.assert_shape(state.inner[0].mu["x"].scale, (64, 1))
        chex.assert_shape(state.inner[0].nu["x"].root.scale, (1, 1))
        assert len(quantized_arrays(state)) == 4

    def test_second_moments_are_found_in_named_chains(self):
        params = dict.fromkeys(("nu", "w"), jax.ShapeDtypeStruct((64, 64), jnp.float32))
        named = optax.named_chain(("mu", optax.scale_by_adam()), ("rate", optax.scale(-1e-3)))
        labels = dict.fromkeys(params, "all")
        for tx in (
            named,
            optax.chain(optax.clip(1.0), named),
            optax.inject_hyperparams(lambda rate: optax.chain(named, optax.scale(rate)))(rate=1.0),
            optax.partition({"all": named}, labels),
        ):
            state = jax.eval_shape(optim.quantize_state(tx).init, params)
            adam = optax.tree.get(state, "ScaleByAdamState")
            for name in params:
                assert adam.nu[name].recipe.element.name == "udynamic8"
                assert isinstance(adam.nu[name], Squared)
                assert adam.mu[name].recipe.element.name == "dynamic8"
        rules = [("mu/mu/", "int8_tensor"), ("mu/nu/", jaxq.Recipe("udynamic8"))]
        state = jax.eval_shape(optim.quantize_state(named, rules).init, params)
        assert state.inner["mu"].mu["w"].recipe.element.name == "int8"

    @pytest.mark.parametrize("min_dim_size_to_factor", [16, 128])
    def test_second_moments_of_adafactor_are_stored_as_roots(self, min_dim_size_to_factor: int):
        """Checks all places of the state, factored and not, also within wrappers."""
        params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
        factored = optax.adafactor(1e-3, min_dim_size_to_factor=min_dim_size_to_factor)
        for tx in (
            factored,
            optax.named_chain(("v", factored)),
            optax.partition({"all": factored}, dict.fromkeys(params, "all")),
        ):
            for rules in (optim.ADAM8BIT, jaxq.Recipe("udynamic8", jaxq.PerBlock(BLOCK))):
                small = optim.quantize_state(tx, rules, min_size=64)
                state = optax.tree.get(jax.eval_shape(small.init, params), "FactoredState")
                roots = quantized_arrays(state)
                assert all(isinstance(leaf, Squared) for leaf in roots)
                assert {leaf.recipe.element.name for leaf in roots} == {"udynamic8"}
                is_factored = min_dim_size_to_factor <= 64
                assert isinstance(state.v["b"], Squared)
                assert isinstance(state.v["w"], Squared) != is_factored
                for place in (state.v_row["w"], state.v_col["w"]):
                    assert isinstance(place, Squared) == is_factored

    def test_v_of_adan_is_not_a_second_moment(self):
        params = {"v": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
        adan = jax.eval_shape(optim.quantize_state(optax.adan(1e-3)).init, params).inner[0]
        assert adan.v["v"].recipe.element.name == "dynamic8"
        assert not isinstance(adan.v["v"], Squared)
        assert isinstance(adan.n["v"], Squared)

    @pytest.mark.parametrize("min_dim_size_to_factor", [16, 128])
    def test_adafactor_takes_no_larger_steps_for_small_gradients(self, min_dim_size_to_factor: int):
        """Compares the largest updates of both states, with gradients of very different sizes."""
        tx = optax.scale_by_factored_rms(min_dim_size_to_factor=min_dim_size_to_factor)
        sizes = 10.0 ** np.random.default_rng(0).uniform(-9, 0, 64)
        draws = np.random.default_rng(1).standard_normal((120, 64, 64))
        g = {"w": draws * np.outer(sizes, sizes), "b": draws[:, 0] * sizes}
        g = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), g)

        def largest(tx):
            params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), g)

            def step(state, g):
                updates, state = tx.update(g, state, params)
                return state, jnp.abs(updates["w"]).max()

            return float(jax.jit(lambda: jax.lax.scan(step, tx.init(params), g)[1][60:].max())())

        assert largest(optim.quantize_state(tx, min_size=64)) < 4 * largest(tx)

    @pytest.mark.parametrize(
        ("tx", "fields"),
        [
            (optax.contrib.prodigy(), ["params0"]),
            (optax.contrib.dog(1.0), ["init_params"]),
            (optax.contrib.dowg(1.0), ["init_params"]),
            (optax.scale_by_distance_over_gradients(), ["init_params"]),
            (optax.contrib.madgrad(1e-3), ["x0", "s"]),
            (optax.contrib.mechanize(optax.adam(1e-3)), ["x0"]),
            (
                optax.contrib.cocob(),
                ["init_particles", "cumulative_gradients", "subgradients", "reward"],
            ),
            (optax.contrib.momo(), ["exp_avg"]),
            (optax.contrib.momo_adam(), ["exp_avg"]),
            (optax.rmsprop(1e-3, centered=True), ["mu", "nu"]),
            (optax.lbfgs(), ["params", "updates", "grad"]),
            (optax.contrib.schedule_free(optax.adam(1e-3), 1e-3), ["z"]),
            (optax.contrib.sam(optax.sgd(1e-3, 0.9), optax.sgd(1e-2), sync_period=2), ["cache"]),
            (optax.scale_by_lbfgs(), ["params", "updates"]),
        ],
        ids=[
            *("prodigy", "dog", "dowg", "distance", "madgrad", "mechanic", "cocob", "momo"),
            *("momo_adam", "centered", "lbfgs", "schedule_free", "sam", "scale_by_lbfgs"),
        ],
    )
    def test_arrays_that_need_precision_are_not_quantized(self, tx, fields: list[str]):
        """Checks each field, and that a parameter of that name is quantized in a moment."""
        names = [*fields, "w"]
        params = dict.fromkeys(names, jax.ShapeDtypeStruct((64, 64), jnp.float32))
        chained = optax.chain(optax.trace(0.9), optax.named_chain(("z", tx)))
        state = jax.eval_shape(optim.quantize_state(chained).init, params).inner
        for name in names:
            assert isinstance(state[0].trace[name], Flattened | jaxq.Quantized)
        for field in fields:
            copies = optax.tree.get_all_with_path(state[1], field)
            trees = [tree for _, tree in copies if isinstance(tree, dict)]
            assert trees
            assert not quantized_arrays(trees)

    @pytest.mark.parametrize(
        "tx",
        [
            optax.contrib.prodigy(),
            data.slow(optax.contrib.mechanize(optax.adam(1e-3))),
            data.slow(optax.chain(optax.scale_by_lbfgs(), optax.scale(-0.1))),
            data.slow(optax.contrib.madgrad(1e-2)),
            optax.contrib.cocob(),
            optax.sm3(0.1),
            data.slow(optax.rmsprop(1e-3, centered=True)),
        ],
        ids=["prodigy", "mechanic", "lbfgs", "madgrad", "cocob", "sm3", "centered"],
    )
    def test_optimizers_learn_with_quantized_states(self, tx):
        """Compares the final loss of a regression with that of the float state."""
        x, target = data.normal((128, 64)), data.normal((64, 64), 1) / 8
        start = {"w": data.normal((64, 64), 2) / 8}

        def final(tx) -> float:
            def loss(params):
                return jnp.mean(jnp.square(x @ params["w"] - x @ target))

            def step(carry, _):
                params, state = carry
                value, g = jax.value_and_grad(loss)(params)
                updates, state = tx.update(g, state, params)
                return (optax.apply_updates(params, updates), state), value

            init = (start, tx.init(start))
            return float(jax.jit(lambda: jax.lax.scan(step, init, length=200)[1][-1])())

        assert final(optim.quantize_state(tx)) < 4 * final(tx)

    @pytest.mark.parametrize(
        "name",
        data.each(
            [
                *("adadelta", "adafactor", "adagrad", "adam", "adamax", "adan", "adabelief"),
                *("amsgrad", "lamb", "nadam", "novograd", "radam", "rmsprop", "sm3", "yogi"),
                *("contrib.acprop", "contrib.ademamix", "contrib.adopt", "contrib.cocob"),
                *("contrib.dadapt_adamw", "contrib.madgrad", "contrib.prodigy"),
                *("contrib.simplified_ademamix", "contrib.sophia"),
            ],
            ["sm3", "contrib.sophia"],
        ),
    )
    def test_unsigned_formats_hold_no_negative_numbers(self, name: str):
        """Looks at the float states of optax's optimizers after steps with random gradients."""
        module, _, name = name.rpartition(".")
        maker = getattr(optax.contrib if module else optax, name)
        needs_rate = next(iter(inspect.signature(maker).parameters)) == "learning_rate"
        tx = optax.with_extra_args_support(maker(1e-3) if needs_rate else maker())
        params = {"w": jnp.zeros((64, 64))}
        small = jax.eval_shape(optim.quantize_state(tx).init, params).inner
        more = {"obj_fn": lambda p: jnp.cos(p["w"] @ p["w"]).sum()}

        @jax.jit
        def steps():
            state = tx.init(params)
            for step in range(3):
                _, state = tx.update(gradients(step, params), state, params, **more)
            return state

        kinds = jaxq.Quantized | Flattened | Squared
        leaves, _ = jax.tree.flatten(small, is_leaf=lambda leaf: isinstance(leaf, kinds))
        for leaf, x in zip(leaves, jax.tree.leaves(steps()), strict=True):
            if isinstance(leaf, kinds) and leaf.recipe.element.min >= 0:
                assert (np.asarray(x) >= 0).all()

    def test_divisors_of_cocob_do_not_become_zero(self):
        """Uses gradients that are zero except for one element, so that others keep a tiny scale."""
        tx = optim.quantize_state(optax.contrib.cocob())
        params = {"w": jnp.ones((64, 64))}
        g = {"w": jnp.zeros((64, 64)).at[0, 0].set(1e3)}

        @jax.jit
        def steps():
            state = tx.init(params)
            for _ in range(2):
                updates, state = tx.update(g, state, params)
            return updates["w"]

        updates = np.asarray(steps())
        assert updates[0, 0] < 0
        assert (updates.ravel()[1:] == 0).all()

    @pytest.mark.parametrize(
        "search",
        [
            optax.scale_by_backtracking_linesearch(15, store_grad=True),
            data.slow(optax.scale_by_zoom_linesearch(15)),
        ],
        ids=["backtracking", "zoom"],
    )
    def test_gradients_of_line_searches_are_read_from_the_state(self, search):
        """Compares every parameter with those of the float state, bit for bit."""
        x = data.normal((16, 64))
        loss = lambda params: jnp.mean(jnp.square(x @ params["w"] - 1))
        value_and_grad = optax.value_and_grad_from_state(loss)

        def final(tx):
            def step(carry, _):
                params, state = carry
                value, g = value_and_grad(params, state=state)
                more = {"value": value, "grad": g, "value_fn": loss}
                updates, state = tx.update(g, state, params, **more)
                return (optax.apply_updates(params, updates), state), None

            start = {"w": jnp.zeros((64, 64))}
            return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=3)[0][0])()

        tx = optax.chain(optax.sgd(1.0), search)
        assert_same_trees(final(optim.quantize_state(tx)), final(tx))

    def test_multi_steps_inside_quantizes_accumulated_gradients(self):
        """Compares the two orders of `quantize_state` and `optax.MultiSteps`."""
        params, g = parameters(), gradients(0)
        outer = optim.quantize_state(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())
        inner = optax.MultiSteps(optim.quantize_state(optax.sgd(1.0)), 2)
        state = outer.update(g, outer.init(params), params)[1]
        assert isinstance(state.inner.acc_grads["w"], Flattened)
        state = inner.update(g, inner.init(params), params)[1]
        assert_same(state.acc_grads["w"], g["w"])

    def test_stochastic_rounding_carries_a_key(self):
        params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
        g = jax.tree.map(lambda p: p * jnp.linspace(0.1, 1, 64)[None, :], params)
        tx = optim.quantize_state(optax.sgd(1.0, momentum=0.9), STOCHASTIC, key=jax.random.key(3))
        update = jax.jit(tx.update)
        first = update(g, tx.init(params))[1]
        a, b = (first.inner[0].trace[name] for name in "ab")
        assert (np.asarray(a.codes) != np.asarray(b.codes)).any()
        assert (np.asarray(first.key) != np.asarray(tx.init(params).key)).any()
        assert_same_trees(first, update(g, tx.init(params))[1])
        raw = optim.quantize_state(
            optax.sgd(1.0, momentum=0.9), STOCHASTIC, key=jax.random.PRNGKey(3)
        )
        assert_same_trees(first, jax.jit(raw.update)(g, raw.init(params))[1])
        mean = np.asarray(a.dequantize()).mean(0)
        np.testing.assert_allclose(mean, g["a"][0], atol=5 * 0.5 / 127 / 8)

    def test_vmapped_seeds_equal_separate_runs(self):
        params = {"w": jnp.ones((64, 64))}

        def run(key):
            tx = optim.quantize_state(optax.sgd(1.0, momentum=0.9), STOCHASTIC, key=key)

            def step(state, i):
                g = {"w": params["w"] * jnp.cos(i) / jnp.arange(1.0, 65.0)[None, :]}
                updates, state = tx.update(g, state)
                return state, updates["w"][0]

            return jax.lax.scan(step, tx.init(params), jnp.arange(3.0))

        keys = jax.random.split(jax.random.key(0), 2)
        states, updates = jax.jit(jax.vmap(run))(keys)
        one = jax.jit(run)
        for i, key in enumerate(keys):
            state, want = one(key)
            assert_same_trees(jax.tree.map(lambda leaf, i=i: leaf[i], states), state)
            assert_same(updates[i], want)
        assert (np.asarray(updates[0]) != np.asarray(updates[1])).any()

    def test_variables_of_nnx_are_optimized_like_plain_arrays(self):
        """Compares `nnx.Optimizer`, a tree of variables, and a tree of arrays."""
        x = data.normal((4, 64))
        rule = jaxq.Recipe("dynamic8", jaxq.PerBlock(256), rounding="stochastic")
        tx = optim.quantize_state(optax.adam(1e-2), [("", rule)], key=jax.random.key(1))
        model = nnx.Linear(64, 100, use_bias=False, rngs=nnx.Rngs(0))
        definition, variables = nnx.split(nnx.clone(model))  # Of its own: the step changes `model`.
        arrays = nnx.as_pure(variables)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        def loss(model: nnx.Linear) -> jax.Array:
            return (model(x) ** 2).mean()

        @nnx.jit
        def nnx_step(model: nnx.Linear, optimizer: nnx.Optimizer) -> None:
            optimizer.update(model, nnx.grad(loss)(model))

        @jax.jit
        def step(params, state):
            gradient = jax.grad(lambda params: loss(nnx.merge(definition, params)))(params)
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        states = [tx.init(variables), tx.init(arrays)]
        for _ in range(3):
            nnx_step(model, optimizer)
            variables, states[0] = step(variables, states[0])
            arrays, states[1] = step(arrays, states[1])
        assert len(quantized_arrays(states[0])) == 2
        assert_same_trees(*states)
        assert_same(variables["kernel"].get_value(), arrays["kernel"])
        assert len(quantized_arrays(nnx.as_pure(optimizer.opt_state))) == 2
        np.testing.assert_allclose(model.kernel.get_value(), arrays["kernel"], rtol=1e-6)

    @pytest.mark.slow
    def test_restored_checkpoint_continues_bitwise(self):
        params = parameters()
        rules = [("mu/w", STOCHASTIC), ("nu/w", jaxq.Recipe("udynamic8"))]
        tx = optim.quantize_state(optax.adam(1e-3), rules, key=jax.random.key(1))
        update = jax.jit(tx.update)
        _, state = update(gradients(0), tx.init(params))
        leaves, structure = jax.tree.flatten(state)
        file = io.BytesIO()
        np.savez(file, *leaves)
        file.seek(0)
        with np.load(file) as stored:
            restored = structure.unflatten([stored[f"arr_{i}"] for i in range(len(leaves))])
        chex.assert_trees_all_equal_structs(restored, tx.init(params))
        assert_same_trees(update(gradients(1), restored), update(gradients(1), state))

    def test_compiles_once_and_donates_its_state(self):
        params = parameters()
        tx = optim.quantize_state(optax.adam(1e-3))

        @chex.assert_max_traces(n=1)
        def step(params, state, g):
            updates, state = tx.update(g, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(step, donate_argnums=(0, 1))
        state = tx.init(params)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
        memory = step.lower(params, state, gradients(0)).compile().memory_analysis()
        assert memory.alias_size_in_bytes == size
        for i in range(5):
            old = state
            params, state = step(params, state, gradients(i))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))

    def test_nonfinite_gradient_affects_only_its_block(self):
        params = {"w": jnp.ones((64, 64))}
        g = {"w": jnp.ones((64, 64)).at[4, 0].set(jnp.nan)}
        tx = optim.quantize_state(optax.sgd(1.0, momentum=0.9))
        _, state = tx.update(g, tx.init(params))
        bad = np.isnan(state.inner[0].trace["w"].dequantize())
        np.testing.assert_array_equal(np.flatnonzero(bad), np.arange(BLOCK, 2 * BLOCK))

    def test_optax_tree_utilities_find_arrays_of_the_state(self):
        tx = optim.quantize_state(optax.adam(1e-3))
        state = jax.eval_shape(tx.init, parameters())
        chex.assert_shape(optax.tree_utils.tree_get(state, "count"), ())
        shapes = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf.shape, state)
        assert shapes.inner[0].mu["b"] == (77,)
        assert shapes.inner[0].mu["w"].row.codes == (70 * 77,)

    def test_divisible_rows_keep_their_shape(self):
        w = data.normal((4, 2048))
        update = optim.quantize_state(optax.sgd(1.0, momentum=0.9))
        state = update.update(w, update.init(w))[1].inner[0].trace
        chex.assert_shape(state, (4, 2048))
        codes, scale, _ = self.quantized(np.asarray(w), "dynamic8")
        np.testing.assert_array_equal(state.codes.ravel(), codes)
        np.testing.assert_array_equal(state.scale.ravel(), scale)

    @pytest.mark.parametrize(
        ("recipe", "key", "text"),
        [
            (STOCHASTIC, None, "needs `key`, got None"),
            ("int8_tensor", jax.random.PRNGKey(0), "no recipe draws random bits, got a key"),
            ([("kernel", "int8_tensor")], None, r"Rule\('kernel'\) matches no leaf"),
            (
                [("mu/b", "int8_tensor")],
                None,
                "leaf '0/mu/b', which has .* fewer than min_size=4096",
            ),
            ([("mu/w", jaxq.PerTensor())], None, "A recipe must be"),
            (jaxq.Recipe("int8", jaxq.PerChannel(2)), None, "leaf '0/mu/w': PerChannel.*axis 2"),
        ],
    )
    def test_invalid_input_raises(self, recipe, key, text: str):
        with pytest.raises((ValueError, TypeError), match=text):
            optim.quantize_state(optax.adam(1e-3), recipe, key=key).init(parameters())


class TestQuantizedGradients:
    @pytest.mark.parametrize("dtype", [data.slow("float32"), "bfloat16"])
    def test_error_feedback_matches_numpy(self, dtype: str):
        tx = optim.quantize_gradients("int4_tensor")
        state = tx.init(jnp.zeros((8, 16), dtype))
        f = np.float32
        residual = np.zeros((8, 16), f)
        for step in range(5):
            g = jnp.asarray(gradients(step)["w"][:8, :16], dtype)
            q, state = tx.update(g, state)
            chex.assert_type(q, g.dtype)
            total = np.asarray(g, f) + residual
            scale = np.abs(total).max() / f(7)
            want = (np.rint(total / scale) * scale).astype(dtype)
            residual = total - want.astype(f)
            np.testing.assert_array_equal(q, want)
            np.testing.assert_array_equal(state.residual, residual)

    def test_error_feedback_preserves_sum(self):
        """Checks that emitted updates sum to the gradients minus the residual, up to rounding."""
        n, g = 200, data.normal((3, 5))

        def total(**options):
            tx = optim.quantize_gradients(jaxq.Recipe("ternary"), **options)
            step = lambda s, _: tx.update(g, s)[::-1]
            state, given = jax.lax.scan(step, tx.init(g), length=n)
            return np.asarray(given, np.float64).sum(0), state

        exact = n * np.asarray(g, np.float64)
        given, state = total()
        largest = np.abs(given).max() / n + np.abs(state.residual).max()
        assert np.abs(given + state.residual - exact).max() <= n * 2 * 2.0**-24 * largest
        assert np.abs(given - exact).max() < 2 * np.abs(g).max()
        forgotten, state = total(error_feedback=False)
        assert np.abs(forgotten - exact).max() > 0.2 * n * np.abs(g).max()
        assert jax.tree.leaves(state) == []

    def test_nonfinite_gradients_leave_no_residual(self):
        tx = optim.quantize_gradients(jaxq.Recipe("int4", jaxq.PerBlock(4)))
        g = jnp.asarray([1.0, np.nan, 0.3, 0.2, 1.0, 0.31, 0.2, np.inf, 1.0, 0.31, 0.2, 0.0])
        q, state = tx.update(g, tx.init(g))
        assert np.isnan(q[:8]).all()
        assert (np.asarray(state.residual)[:8] == 0).all()
        assert (np.asarray(state.residual)[8:] != 0).any()

    @pytest.mark.slow
    def test_rules_select_leaves_and_keys_change_each_step(self):
        params = {**parameters(), "n": jnp.zeros((), jnp.int32)}
        rules = [("w", jaxq.Recipe("int4", rounding="stochastic"))]
        tx = optim.quantize_gradients(rules, key=jax.random.key(0))
        g = {**gradients(0), "n": jnp.ones((), jnp.int32)}
        update = jax.jit(tx.update)
        q, state = update(g, tx.init(params))
        assert_same(q["b"], g["b"])
        assert q["n"] == 1
        assert len(np.unique(q["w"])) <= 15
        again, _ = update(g, state)
        assert (np.asarray(again["w"]) != np.asarray(q["w"])).any()
        chain = optax.chain(tx, optax.sgd(1.0))
        q, _ = update(gradients(0), tx.init(parameters()))
        updates, _ = jax.jit(chain.update)(gradients(0), chain.init(parameters()))
        assert_same(updates["w"], -q["w"])
        with pytest.raises(ValueError, match=r"quantize_gradients: Rule\('v'\) matches no leaf"):
            optim.quantize_gradients([("v", "int8_tensor")]).init(params)
        with pytest.raises(ValueError, match="needs `key`"):
            optim.quantize_gradients(STOCHASTIC)
        tx = optim.quantize_gradients([("w", jaxq.Recipe("int8", jaxq.PerBlock(64)))])
        with pytest.raises(ValueError, match=r"quantize_gradients: leaf 'w': .*64 does not divide"):
            tx.update(gradients(0), tx.init(parameters()))


class TestUpdates:
    @pytest.mark.usefixtures("eager")
    @pytest.mark.parametrize(
        ("name", "stored"),
        [(n, n) for n in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")]
        + [("bfloat16", "float32"), ("float6_e2m3fn", "float32")],
    )
    def test_stochastic_updates_are_unbiased(self, name: str, stored: str):
        """Checks that the mean over all random bits equals the float32 sum exactly."""
        n, k = 256, fractions.Fraction
        mode = jaxq.Stochastic(8)
        w = np.float32([1.0, -1.75, 0.5, -0.25, 1.0])
        spacing = float(np.spacing(np.ones((), ml_dtypes.finfo(name).dtype)).astype(np.float64))
        u = np.float32([1, 3, -37, 10, -127]) * np.float32(spacing / n)
        r = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None], (n, 5))
        rounding = lambda units, negative, _: mode(units, negative, jnp.asarray(r))
        many = [jnp.asarray(np.broadcast_to(a, (n, 5))) for a in (w, u)]
        options = {} if stored == name else {"fmt": name}
        new = optim.apply_updates(many[0].astype(stored), many[1], rounding=rounding, **options)
        chex.assert_type(new, stored)
        assert_same(jaxq.cast(new.astype(jnp.float32), name), new.astype(jnp.float32))
        new = np.asarray(new).astype(np.float64)
        assert (new != w).any(0).all(), "every update must change some results"
        for j in range(5):
            mean = sum(k(float(v)) for v in new[:, j]) / n
            exact = k(float(w[j])) + k(float(u[j]))
            assert mean == exact

    def test_nearest_updates_match_ml_dtypes(self):
        rng = np.random.default_rng(0)
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"):
            w = rng.standard_normal(500).astype(name)
            u = rng.standard_normal(500).astype(np.float32) / 50
            got = optim.apply_updates(jnp.asarray(w), jnp.asarray(u), rounding="nearest_even")
            assert_same(got, (w.astype(np.float32) + u).astype(name))

    def test_updates_draw_per_leaf_and_keep_other_dtypes(self):
        w = jnp.ones((64,), jnp.bfloat16)
        params = {"a": w, "b": w, "c": jnp.ones(3), "n": jnp.asarray(2), "none": None}
        u = {"a": jnp.full(64, 2.0**-9), "b": jnp.full(64, 2.0**-9), "c": jnp.full(3, 1e-6)}
        u |= {"n": jnp.asarray(3), "none": None}
        key = jax.random.key(0)
        apply = jax.jit(optim.apply_updates)
        new = apply(params, u, key=key)
        assert new["n"] == 5
        assert_same(new["c"], params["c"] + u["c"])
        assert (np.asarray(new["a"]) != np.asarray(new["b"])).any()
        own = jax.random.fold_in(key, 0)
        want = jaxq.cast(jnp.full(64, 1 + 2.0**-9), "bfloat16", rounding="stochastic", key=own)
        assert_same(new["a"], want.astype(jnp.bfloat16))
        rules = [("a", "float8_e4m3fn"), ("c", None)]
        new = optim.apply_updates(params, u, fmt=rules, key=key)
        assert_same(new["a"], jaxq.cast(new["a"], "float8_e4m3fn"))
        keys = jax.random.split(key, 3)
        rows = jax.jit(jax.vmap(lambda k: optim.apply_updates(w, u["a"], key=k)))(keys)
        assert_same(rows[1], optim.apply_updates(w, u["a"], key=keys[1]))

    def test_updates_saturate_and_keep_nan(self):
        w = jnp.asarray([448.0, -448, 448, np.nan], jnp.float8_e4m3fn)
        u = jnp.asarray([100.0, -1e30, np.inf, 1.0])
        new = optim.apply_updates(w, u, key=jax.random.key(0)).astype(jnp.float32)
        np.testing.assert_array_equal(new, [448, -448, np.nan, np.nan])

    def test_invalid_input_raises(self):
        w, key = jnp.ones(3, jnp.bfloat16), jax.random.key(0)
        with pytest.raises(ValueError, match="apply_updates: stochastic rounding needs `key`"):
            optim.apply_updates(w, w)
        with pytest.raises(ValueError, match="draws no random bits"):
            optim.apply_updates(w, w, rounding="nearest_even", key=key)
        with pytest.raises(ValueError, match=r"apply_updates: Rule\('v'\) matches no leaf"):
            optim.apply_updates({"w": w}, {"w": w}, fmt=[("v", "int8")], key=key)
        narrow = {"w": w.astype(jnp.float4_e2m1fn)}
        with pytest.raises(ValueError, match=r"leaf 'w': .*float32 with fmt='float4_e2m1fn'"):
            optim.apply_updates(narrow, {"w": w}, key=key)


class TestSchedules:
    def test_bits_schedule_decreases_in_steps(self):
        down, up = optim.bits_schedule(8, 4, steps=10, begin=3), optim.bits_schedule(2, 4, steps=4)
        steps = jnp.arange(16)
        want = [8] * 6 + [7, 7] + [6, 6, 6] + [5, 5] + [4] * 3
        np.testing.assert_array_equal(jax.jit(jax.vmap(down))(steps), want)
        np.testing.assert_array_equal(jax.vmap(up)(steps)[:6], [2, 2, 3, 3, 4, 4])
        chex.assert_type(down(0), jnp.int32)

        @jax.jit
        @chex.assert_max_traces(n=1)
        def snapped(step):
            return jaxq.cast(jnp.float32(100.0), jaxq.int_grid(down(step)))

        assert [float(snapped(s)) for s in (0, 7, 15)] == [100, 63, 7]
        for wrong in ((0, 4, 3), (8, 4, 0), (8, 2, 2**30)):
            with pytest.raises(
                ValueError,
                match=r"^bits_schedule: (`first`|`steps`|steps \*)",
            ):
                optim.bits_schedule(wrong[0], wrong[1], steps=wrong[2])

    def test_updates_are_quantized_from_a_given_step(self):
        late = optim.quantize_after(lambda x: jax.tree.map(lambda v: jaxq.cast(v, "int4"), x), 5)
        x = {"a": jnp.asarray([0.3, np.nan, -0.0, 1e9]), "b": jnp.ones(())}
        f = jax.jit(chex.assert_max_traces(late, n=1))
        assert_same_trees(f(x, 4), x)
        assert np.signbit(f(x, 4)["a"][2])
        assert_same(f(x, 5)["a"], jaxq.cast(x["a"], "int4"))
        clipped = optim.quantize_after(lambda x: jaxq.cast(x, "int4", gradient="clipped"), 5)
        slope = jax.grad(lambda x, step: clipped(x, step).sum())
        assert_same(slope(jnp.asarray([1.0, 99.0]), 4), np.float32([1, 1]))
        assert_same(slope(jnp.asarray([1.0, 99.0]), 5), np.float32([1, 0]))


def test_optim_is_imported_lazily():
    assert jaxq.optim is optim
    with pytest.raises(AttributeError, match="has no attribute 'optimizers'"):
        _ = jaxq.optimizers
