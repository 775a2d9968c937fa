#!/usr/bin/env bash
# A model that no table knows: draft a table, check that it covers everything, convert with it, prove it.
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
cp -rT "$here/fixtures/tiny/qwen3" novel
sed -i 's/"model_type": "qwen3"/"model_type": "novel"/; s/Qwen3ForCausalLM/NovelForCausalLM/' novel/config.json

mbx convert hf-to-mcore novel novel-mcore || echo "no table knows it: exit code $?"
mbx models new novel > novel.toml
mbx models check novel.toml --against novel
mbx convert hf-to-mcore novel novel-mcore --mapping novel.toml
mbx convert mcore-to-hf novel-mcore novel-back --mapping novel.toml
diff -r --exclude=mbx_manifest.json novel novel-back && echo "both directions hold, byte for byte"
mbx verify parity novel novel-mcore --mapping novel.toml
