"""The torch stand-in for Mamba's kernels computes what Transformers' own Mamba-2 layer does."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from _mamba_reference import GatedRMSNorm, _training


def _both(*, exchange_b_and_c: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of Transformers' mixer and of the stand-in with the same weights, in fp32."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    torch.manual_seed(0)
    config = NemotronHConfig(
        hidden_size=32, mamba_num_heads=8, mamba_head_dim=8, n_groups=4, ssm_state_size=16, chunk_size=8
    )
    theirs = NemotronHMamba2Mixer(config, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        norm = GatedRMSNorm(64, eps=config.layer_norm_epsilon, group_size=16)
        norm.weight.copy_(theirs.norm.weight)
        weights = {
            "conv1d_weight": theirs.conv1d.weight,
            "conv1d_bias": theirs.conv1d.bias,
            "A_log": theirs.A_log,
            "D": theirs.D,
            "dt_bias": theirs.dt_bias,
        }
        getters = {f"get_{name}": lambda value=value: value for name, value in weights.items()}
        cp = SimpleNamespace(d_inner_local_tpcp=64, ngroups_local_tpcp=4, nheads_local_tpcp=8, **getters)
        mixer = SimpleNamespace(cp=cp, norm=norm, d_state=16, rmsnorm=True, D_has_hdim=False)
        x = torch.randn(2, 20, 32)
        projected = theirs.in_proj(x)
        if exchange_b_and_c:
            z_x, b, c, dt = projected.split([128, 64, 64, 8], -1)
            projected = torch.cat([z_x, c, b, dt], -1)
        ours = theirs.out_proj(_training(mixer, projected.transpose(0, 1)).transpose(0, 1))
        return theirs(x), ours


def test_the_stand_in_agrees_with_transformers() -> None:
    theirs, ours = _both()
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_exchanged_b_and_c_are_seen() -> None:
    theirs, ours = _both(exchange_b_and_c=True)
    assert (theirs - ours).abs().max() > 0.1
