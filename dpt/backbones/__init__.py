"""The frozen base models, one file a family: `stable_diffusion` (1 and 2), `sdxl`, `sd3`, `flux`.

To add a family: a subclass of `StableDiffusion` that encodes prompts (`condition`) and says its sizes; its pipeline in
`loading` and the classes of its parts in `model_folder`; the names of its blocks in `blocks`, and how their maps are
read in `unet` or `diffusion_transformer`. Adapter, losses, trainer, guidance and choosing stay as they are.
"""
