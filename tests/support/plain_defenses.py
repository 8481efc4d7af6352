"""Plain implementations of the defenses with full logits and features and without chunking, as the test oracle."""

from __future__ import annotations

import itertools

import torch


def documents(batch):
    """Yield (row, token indices) of every sequence of the batch, without padding."""
    ids = batch["input_ids"]
    for row in range(ids.shape[0]):
        if "attention_mask" in batch:
            yield row, batch["attention_mask"][row].nonzero().flatten().tolist()
            continue
        positions = batch.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids))[row].tolist()
        starts = [index for index, position in enumerate(positions) if position == 0] + [len(positions)]
        for start, end in itertools.pairwise(starts):
            yield row, list(range(start, end))


def looked_at(batch, tokens):
    """Like `documents`, with only the tokens that count for the setting `tokens`."""
    for row, document in documents(batch):
        nexts = dict(itertools.pairwise(document))
        trained = [i for i in document if i in nexts and batch["labels"][row, nexts[i]] != -100]
        indices = trained if tokens == "completion" else document
        if tokens == "safe":
            indices = [i for i in document if batch["safe"][row, i]]
        if indices:
            yield row, indices


def weights_by_place(batch, row, indices, positions):
    """Return the weight of each token: that of the place, in its completion, of the token that it predicts; else 1."""
    weights = {}
    for _, document in (one for one in documents(batch) if one[0] == row):
        place = 0
        for index, following in itertools.pairwise(document):
            place = place + 1 if batch["labels"][row, following] != -100 else 0
            weights[index] = positions[place - 1] if 0 < place <= len(positions) else 1.0
    return torch.tensor([weights.get(index, 1.0) for index in indices], dtype=torch.float64)


def kl_sum(logits, reference_logits, batch, *, direction="reverse", tokens="all", temperature=1.0, positions=()):
    """Return (sum over tokens, number of tokens)."""
    total, count = 0.0, 0
    for row, indices in looked_at(batch, tokens):
        p = (logits[row, indices] / temperature).log_softmax(-1)
        q = (reference_logits[row, indices] / temperature).log_softmax(-1)
        if direction == "forward":
            p, q = q, p
        weights = weights_by_place(batch, row, indices, positions).to(p) if positions else 1.0
        total = total + ((p.exp() * (p - q)).sum(-1) * weights).sum()
        count += len(indices)
    return total, count


def feature_distance_sum(features, reference_features, batch, *, normalize="sequence", tokens="all"):
    """Return (sum over sequences and layers, number of sequences)."""
    total, count = 0.0, 0
    for row, indices in looked_at(batch, tokens):
        count += 1
        for h, h0 in zip(features, reference_features, strict=True):
            x, y = h[row, indices], h0[row, indices]
            if normalize == "sequence":
                x, y = x / x.norm(), y / y.norm()
            elif normalize == "token":
                x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
            total = total + (x - y).square().sum()
    return total, count


def template_anchor_sum(model, batch, places):
    """Return (sum over sequences, number of sequences) of the mean over `places`, mean over layers of keys plus values.

    For Llama with an adapter. `places` has (row, token indices) of each sequence's template tokens.
    """
    states, reference = keys_and_values(model, batch), None
    with torch.no_grad(), model.disable_adapter():
        mode = model.training
        reference = keys_and_values(model.eval(), batch)
        model.train(mode)
    total = 0.0
    for row, indices in places:
        for k, k0 in zip(states, reference, strict=True):
            apart = (k[row, indices] - k0[row, indices]).square().sum(-1) / k0[row, indices].square().sum(-1)
            total = total + apart.mean() / (len(states) / 2)
    return total, len(places)


def keys_and_values(model, batch):
    """Return the outputs of k_proj and v_proj of every layer, recorded by plain hooks."""
    found = []
    layers = model.get_base_model().model.layers
    handles = [
        module.register_forward_hook(lambda _m, _a, out: found.append(out))
        for layer in layers
        for module in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    model(**{key: value for key, value in batch.items() if key not in {"labels", "safe"}}, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def forward(model, batch):
    """Return logits and layer outputs, recorded by plain hooks."""
    features = []
    blocks = model.get_base_model().model.layers if hasattr(model, "get_base_model") else model.model.layers
    handles = [
        block.register_forward_hook(lambda _m, _a, out: features.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    inputs = {key: value for key, value in batch.items() if key not in {"labels", "safe"}}
    output = model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return output.logits, features


def reference_forward(model, batch):
    with torch.no_grad(), model.disable_adapter():
        mode = model.training
        model.eval()
        result = forward(model, batch)
        model.train(mode)
    return result
