"""The cost of a large codebook for the generator: the loss in nats per code at four sizes.

One seed of three sizes was run, with tokenizers of 600 steps; the results are in docs/codebook_scaling.md.

It needs a tokenizer of every size, and its codes. An image has validation/loss x 256 codes / ln 2 bits. What
`evaluate --run=POINT --num=1000` measures on samples is in the table that is written next.

for size in 256 1024 4096 16384; do
  python -m ibq_jax train --config=configs/tokenizer.py:openmoji32 --config.codebook.size=$size --workdir=runs/tok$size
  python -m ibq_jax tokenize --tokenizer=runs/tok$size --out=runs/codes$size
done
python -m ibq_jax sweep --study=configs/studies/generator_codes.py --workdir=runs/generator_codes
"""

CONFIG = "configs/autoregressive.py:openmoji32"
OVER = {"token_cache": ("runs/codes256", "runs/codes1024", "runs/codes4096", "runs/codes16384")}
SEEDS = 3
