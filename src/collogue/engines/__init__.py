"""Adapters of inference engines: plugins that put :mod:`collogue.flashinfer` where the engine calls FlashInfer. See docs/engines.md."""
