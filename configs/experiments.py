"""Every experiment of the paper, with its number there and its command here.

Data, no code; `python -m diffit_jax.main --list` prints it with what each one
costs. The numbers are the paper's (arXiv 2312.02139v3), FID of 50,000 samples;
ours are not yet run. "Inferred" ones follow from Figure 8's percentages.

Each row: item of the paper, what it is, the paper's value, config with its
variants, as after --config=configs/.
"""

EXPERIMENTS = (
  ("Table 1", "ImageNet-256, power-cosine guidance 4.4",
   "FID 1.73, IS 276.5, P .80, R .62", "imagenet256.py"),
  ("Table 1", "ImageNet-512, constant guidance 1.49",
   "FID 2.67, IS 252.1, P .83, R .55", "imagenet512.py"),
  ("Table 2", "CIFAR-10", "FID 1.95", "cifar10.py"),
  ("Table 2", "FFHQ-64", "FID 2.22", "ffhq64.py"),
  ("Table 3, 1", "CIFAR-10, time 512, tokens 512", "FID 1.99",
   "cifar10.py:dim=512"),
  ("Table 3, 1", "FFHQ-64, time 512, tokens 512", "FID 2.27",
   "ffhq64.py:dim=512"),
  ("Table 3, 2", "CIFAR-10, time 256, tokens 256", "FID 2.13",
   "cifar10.py:time=256"),
  ("Table 3, 2", "FFHQ-64, time 256, tokens 256", "FID 2.41",
   "ffhq64.py:time=256"),
  ("Table 3, 3", "CIFAR-10, time 512, tokens 256", "FID 1.95", "cifar10.py"),
  ("Table 3, 3", "FFHQ-64, time 512, tokens 256", "FID 2.22", "ffhq64.py"),
  ("Table 4 E", "DiffiT encoder and decoder", "FID 1.95", "cifar10.py"),
  ("Table 6 F", "time in the relative position bias only", "FID 3.97",
   "cifar10.py:time_in=rpb_time"),
  ("Table 6 G", "time in the MLP only", "FID 3.81",
   "cifar10.py:time_in=mlp_time"),
  ("Table 6 H", "TMSA", "FID 1.95", "cifar10.py"),
  ("Table 7", "CIFAR-10, time token attended to apart", "FID 2.28",
   "cifar10.py:time_in=separate"),
  ("Table 7", "FFHQ-64, time token attended to apart", "FID 2.59",
   "ffhq64.py:time_in=separate"),
  ("Table 7", "CIFAR-10, mixed (TMSA)", "FID 1.95", "cifar10.py"),
  ("Table 7", "FFHQ-64, mixed (TMSA)", "FID 2.22", "ffhq64.py"),
  ("Table 8", "CIFAR-10, Fourier embedding of the noise level", "FID 2.02",
   "cifar10.py:embedding=fourier"),
  ("Table 8", "FFHQ-64, Fourier embedding of the noise level", "FID 2.37",
   "ffhq64.py:embedding=fourier"),
  ("Table 8", "CIFAR-10, positional embedding", "FID 1.95", "cifar10.py"),
  ("Table 8", "FFHQ-64, positional embedding", "FID 2.22", "ffhq64.py"),
  ("Table 9", "DiffiT-XL/2", "561 M, 114 G, FID 1.73", "imagenet256.py"),
  ("Figure 2", "attention maps without TMSA", "pictures",
   "cifar10.py:time_in=plain"),
  ("Figure 8", "CIFAR-10, window 2", "FID 2.44 (inferred)",
   "cifar10.py:window=2"),
  ("Figure 8", "CIFAR-10, window 4", "FID 1.98 (inferred)", "cifar10.py"),
  ("Figure 8", "CIFAR-10, window 8", "FID 1.95 (inferred)",
   "cifar10.py:window=8"),
  ("Figure 8", "FFHQ-64, window 2", "FID 2.58 (inferred)",
   "ffhq64.py:window=2"),
  ("Figure 8", "FFHQ-64, window 4", "FID 2.30 (inferred)",
   "ffhq64.py:window=4"),
  ("Figure 8", "FFHQ-64, window 8", "FID 2.22 (inferred)", "ffhq64.py"),
  ("App. I.1", "CIFAR-10, bilinear resizing", "similar",
   "cifar10.py:resize=bilinear"),
  ("App. I.1", "FFHQ-64, bilinear resizing", "similar",
   "ffhq64.py:resize=bilinear"),
  ("App. H.1", "CIFAR-10, 4 blocks per level", "-", "cifar10.py:blocks=4"),
  ("App. I.1", "FFHQ-64, blocks 1, 2, 2, 2", "-",
   "ffhq64.py:blocks=1-2-2-2"),
  ("App. I.1", "CIFAR-10, 200,000 steps", "-",
   "cifar10.py:duration=iterations"),
  ("App. I.1", "FFHQ-64, 200,000 steps", "-",
   "ffhq64.py:duration=iterations"),
  ("App. H.2", "ImageNet-256, 30 blocks", "-",
   "imagenet256.py:depth=paper_text"),
)  # fmt: skip

# What changes only how a trained network is sampled, as flags of evaluate.
SWEEPS = (
  ("Figure 7a", "FID against guidance, ImageNet-256", "least at 4.6",
   "imagenet256.py", "--sweep=guidance_scale=1,2,3,4,4.4,4.6,5,6,7"),
  ("Figure 7a", "FID against guidance, ImageNet-512", "least at 1.49",
   "imagenet512.py", "--sweep=guidance_scale=1,1.25,1.49,1.75,2,3,5,7"),
)  # fmt: skip
