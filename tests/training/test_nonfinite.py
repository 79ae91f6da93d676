"""A NaN or an infinity stops the run, names step, batch and layer, and leaves the last checkpoint as it was."""

import pickle

import pytest
import torch
from torch import nn

from subquad.training import Batch, NonFiniteLoss, read_metrics
from subquad.training.nonfinite import first_non_finite


class Poisoned(nn.Module):
    """Passes its input on, but for a token above the vocabulary, which it turns into ``value``."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, tokens):
        return torch.where((tokens == 10)[..., None], self.value, x)


class Model(nn.Module):
    def __init__(self, value=float("nan")):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), Poisoned(value), nn.Linear(8, 8)])
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(8, 11)

    def forward(self, tokens):
        x = self.dropout(self.layers[0](self.embedding(tokens)))
        return self.head(self.layers[2](self.layers[1](x, tokens)))


def objective(model, batch):
    logits = model(batch.inputs)
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()), {}


class Data:
    """Token 10, the poisonous one, comes in batch ``bad`` only."""

    def __init__(self, bad):
        self.bad = bad

    def batch(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(10, (4, 5), generator=generator)
        if index == self.bad:
            tokens[2, 3] = 10
        return Batch(tokens, tokens)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_step_batch_and_layer_are_named(accumulate, value, tmp_path, options, quiet_train):
    model = Model(value)
    chosen = options(save_every=2, accumulate=accumulate, steps=20)
    with pytest.raises(NonFiniteLoss, match=r"step \d+ in batch 13: the loss is nan: .*'layers.1'") as caught:
        quiet_train(model, Data(13), chosen, out=tmp_path, objective=objective)
    step = 13 // accumulate + 1
    assert (caught.value.step, caught.value.batch, caught.value.layer) == (step, 13, "layers.1")
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, step))
    newest = max(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert newest == f"step-{(step - 1) // 2 * 2:08d}"
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_rare_draw_of_dropout_is_found_again(options, quiet_train):
    """The layer fails for some random draws only; the repeated pass draws what the step drew, in the same place."""

    class Brittle(nn.Module):
        def forward(self, x):
            return torch.where(torch.rand(()) < 0.05, torch.log(torch.zeros(())), x)

    model = nn.Sequential(nn.Embedding(11, 8), nn.Dropout(0.5), Brittle(), nn.Dropout(0.5), nn.Linear(8, 11))
    with pytest.raises(NonFiniteLoss) as caught:
        quiet_train(model, Data(None), options(steps=400, accumulate=4), objective=objective)
    assert caught.value.layer == "2"
    assert 4 * (caught.value.step - 1) <= caught.value.batch < 4 * caught.value.step


def test_a_gradient_that_is_not_finite(tmp_path, tiny_model, counted_data, options, quiet_train):
    def root_at_zero(model, batch):
        return model(batch.inputs).logits.square().mean() + (0 * model.norm.bias.sum()).abs().sqrt(), {}

    model = tiny_model()
    before = model.norm.bias.clone()
    with pytest.raises(NonFiniteLoss, match="loss is finite, but the gradient of 'norm\\.bias'") as caught:
        quiet_train(model, counted_data(), options(), out=tmp_path, objective=root_at_zero)
    assert (caught.value.step, caught.value.batch, caught.value.layer) == (1, None, "norm.bias")
    assert torch.equal(model.norm.bias, before)


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, tiny_model, counted_data, options, quiet_train):
    def overflowing(model, options):
        return torch.optim.SGD([("hidden.bias", model.hidden.bias)], lr=3e38)

    def steep(model, batch):
        return 1e3 * model.hidden.bias.sum(), {}

    chosen = options(steps=1, warmup_steps=0, clip=None, learning_rate=1.0)
    with pytest.raises(NonFiniteLoss, match="made the weight 'hidden\\.bias' non-finite"):
        quiet_train(tiny_model(), counted_data(), chosen, out=tmp_path, objective=steep, optimizer=overflowing)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def find(model, x):
    return first_non_finite(model, x, lambda: model(x).sum())


class Parent(nn.Module):
    """Does arithmetic of its own between its children."""

    def __init__(self, between):
        super().__init__()
        self.first, self.between, self.second = nn.Linear(3, 3), between, nn.Linear(3, 3)

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def test_the_culprit_is_named_not_its_victim():
    x = torch.ones(2, 3)
    assert find(nn.Sequential(nn.Identity(), Parent(lambda x: x / 0)), x)[0] == "1"
    layer, what = find(nn.Sequential(Parent(lambda x: 0 * x / 0)), x)
    assert (layer, what) == ("0", "layer '0' passes NaN to '0.second'")
    assert find(nn.Sequential(Parent(torch.abs)), x)[0] == "loss"
    assert find(nn.Sequential(Parent(torch.abs)), x * float("nan"))[0] == "inputs"
    broken = nn.Sequential(Parent(torch.abs))
    broken[0].second.bias.data[1] = float("inf")
    assert find(broken, x) == ("0.second.bias", "the weight '0.second.bias' is not finite (+inf)")


def test_a_mask_of_minus_infinity_is_not_blamed():
    class Attention(nn.Module):
        def forward(self, scores, mask):
            return (scores + mask).softmax(-1)

    class Masked(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.attention, self.mask = Attention(), mask

        def forward(self, x):
            return self.attention(x, mask=self.mask)

    mask = torch.zeros(2, 3)
    mask[1] = float("-inf")  # a row with nothing to attend to
    assert find(Masked(mask), torch.ones(2, 3))[0] == "attention"


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(NonFiniteLoss(3, 7, "head", "the loss is nan")))
    assert (error.step, error.batch, error.layer, str(error)) == (3, 7, "head", "step 3 in batch 7: the loss is nan")
