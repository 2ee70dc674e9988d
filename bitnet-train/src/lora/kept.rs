//! Products of the forward pass that are kept for blocks that are computed again: as many as fit the room there is. A block
//! whose products are all there is computed again without a multiplication by its weights.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::product::Product;

/// Products by the path of their projection, shared by all projections.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Bytes there is room for.
    room: usize,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    bytes: usize,
    products: BTreeMap<String, Product>,
}

impl Kept {
    /// Nothing yet, with room for so many bytes.
    pub fn new(room: usize) -> Self {
        Self { room, state: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the product of `path`, if there is room.
    pub fn keep(&self, path: &str, product: &Product) {
        let (mut state, bytes) = (self.lock(), product.bytes());
        if state.bytes + bytes <= self.room {
            state.bytes += bytes;
            state.products.insert(path.into(), product.clone());
        }
    }

    /// The product of `path`, if it was kept; it is no longer then.
    pub fn take(&self, path: &str) -> Option<Product> {
        let mut state = self.lock();
        let product = state.products.remove(path)?;
        state.bytes -= product.bytes();
        Some(product)
    }

    /// Forgets all.
    pub fn clear(&self) {
        *self.lock() = State::default();
    }
}
