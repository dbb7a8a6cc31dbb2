//! Share one buffer between devices through dma-buf.
