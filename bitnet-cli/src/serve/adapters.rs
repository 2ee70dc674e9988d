//! The adapters that requests choose from, which change while they run.

use std::sync::{Arc, PoisonError, RwLock};

use crate::adapter::NamedAdapters;

/// Those of a server.
pub struct SharedAdapters(RwLock<(Arc<NamedAdapters>, u64)>);

impl SharedAdapters {
    /// `adapters`, for now.
    pub fn new(adapters: NamedAdapters) -> Self {
        Self(RwLock::new((Arc::new(adapters), 0)))
    }

    /// Those there are now.
    pub fn get(&self) -> Arc<NamedAdapters> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Changes them, all at once. Requests that run keep theirs.
    pub fn change<T>(&self, change: impl FnOnce(&mut NamedAdapters) -> T) -> T {
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let (adapters, version) = &mut *current;
        let result = change(Arc::make_mut(adapters));
        *version += 1;
        result
    }

    /// How often they have changed.
    pub fn version(&self) -> u64 {
        self.0.read().unwrap_or_else(PoisonError::into_inner).1
    }
}
