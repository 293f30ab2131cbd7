"""How batches/ was made: the real sae_dashboard 0.8.0 on a tiny random model. Runs in an environment of its own.

python3 -m venv sd && sd/bin/pip install sae-dashboard==0.8.0 && sd/bin/python make_batches.py
"""

import gzip
from pathlib import Path
from types import SimpleNamespace

import torch
from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from transformer_lens import HookedTransformerConfig

HOOK = "blocks.1.hook_resid_post"
WORDS = [f" w{i}" for i in range(40)] + ["<b>", "\n", "é", " \u202e", "{{1}}"]

torch.manual_seed(0)
cfg = HookedTransformerConfig(
    n_layers=2, d_model=16, d_head=8, n_heads=2, d_mlp=32, n_ctx=16, d_vocab=len(WORDS), act_fn="gelu", seed=0
)
model = HookedSAETransformer(cfg)
model.tokenizer = SimpleNamespace(pad_token_id=0, bos_token_id=0, eos_token_id=0, padding_side="right")
sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=24))
with torch.no_grad():
    sae.b_enc -= 0.5
sae.cfg.metadata.hook_name = HOOK
tokens = torch.randint(1, len(WORDS), (40, 16))

here = Path(__file__).parent / "batches"
here.mkdir(exist_ok=True)
for number, features in enumerate(([0, 1, 2], [3, 23])):
    wanted = SaeVisConfig(hook_point=HOOK, features=features, minibatch_size_tokens=8, ignore_tokens={0})
    data = SaeVisRunner(wanted).run(encoder=sae, model=model, tokens=tokens)
    run = NeuronpediaRunnerConfig(
        sae_set="tiny",
        sae_path="",
        outputs_dir="",
        n_prompts_total=40,
        n_tokens_in_prompt=16,
        model_id="tiny-random",
        layer=1,
    )
    text = NeuronpediaConverter.convert_to_np_json(model, data, run, dict(enumerate(WORDS)))
    (here / f"batch-{number}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
