//! How many nodes a group may have, and who is in the view if there are more.

use super::Group;
use crate::discovery::admission::Refusal;
use crate::view::Change;

impl Group {
    /// Whether there is room for what found none before. Which that was is not kept: the group has to be listed again.
    pub(in crate::discovery) fn has_room_again(&self) -> bool {
        let most = self.admission.limits.nodes;
        let registered = self.nodes.len() - self.nodes.suspects();
        self.has_turned_away
            && registered < most
            && self.named.len() < most
            && !self.candidates.is_full(most)
    }

    /// Suspects make room for who is there.
    pub(super) fn room_for(&mut self, id: &str) -> Result<(), Refusal> {
        let is_new = self.nodes.get(id).is_none();
        let registered = self.nodes.len() - self.nodes.suspects();
        match is_new && registered >= self.admission.limits.nodes {
            true => {
                self.has_turned_away = true;
                Err(self.admission.too_many())
            }
            false => Ok(()),
        }
    }

    /// Removes suspects while there are more nodes than allowed, beginning with those whose time ends
    /// first.
    pub(super) fn make_room(&mut self, changes: &mut Vec<Change>) {
        while self.nodes.len() > self.admission.limits.nodes {
            let Some(id) = self.suspects.first() else {
                return;
            };
            self.remove(&id, changes);
        }
    }
}
