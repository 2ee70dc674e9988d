//! Who is next: clients take turns, and what one client sent goes in order.

use std::collections::VecDeque;

/// What waits, by client.
pub struct Queue<T> {
    clients: VecDeque<(String, VecDeque<T>)>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { clients: VecDeque::new() }
    }
}

impl<T> Queue<T> {
    /// Adds what a client sent behind what it sent before; a client of whom nothing waits comes last.
    pub fn push(&mut self, client: &str, item: T) {
        match self.clients.iter_mut().find(|(name, _)| name == client) {
            Some((_, items)) => items.push_back(item),
            None => self.clients.push_back((client.to_owned(), VecDeque::from([item]))),
        }
    }

    /// What is next.
    pub fn front(&self) -> Option<&T> {
        self.clients.front().and_then(|(_, items)| items.front())
    }

    /// Takes what is next; its client then comes last.
    pub fn pop(&mut self) -> Option<T> {
        let (client, mut items) = self.clients.pop_front()?;
        let item = items.pop_front();
        if !items.is_empty() {
            self.clients.push_back((client, items));
        }
        item
    }

    /// Removes all for which `goes` says so.
    pub fn remove_if(&mut self, goes: impl Fn(&T) -> bool) -> Vec<T> {
        let mut gone = Vec::new();
        for (_, items) in &mut self.clients {
            // Asked before every token, and hardly ever true.
            if !items.iter().any(&goes) {
                continue;
            }
            let all = std::mem::take(items);
            let (leave, stay): (Vec<T>, Vec<T>) = all.into_iter().partition(&goes);
            gone.extend(leave);
            items.extend(stay);
        }
        self.clients.retain(|(_, items)| !items.is_empty());
        gone
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.clients.iter().map(|(_, items)| items.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_take_turns() {
        let mut queue = Queue::default();
        for item in 1..=4 {
            queue.push("a", item);
        }
        queue.push("b", 10);
        queue.push("c", 20);
        queue.push("b", 11);
        assert_eq!((queue.len(), queue.front()), (7, Some(&1)));
        assert_eq!(queue.pop(), Some(1));
        queue.push("d", 30);
        assert_eq!(queue.remove_if(|item| *item == 20 || *item == 3), [20, 3]);
        let order = Vec::from_iter(std::iter::from_fn(|| queue.pop()));
        assert_eq!(order, [10, 2, 30, 11, 4]);
        assert_eq!((queue.len(), queue.front()), (0, None));
    }
}
