//! The requests under way.

use crate::router::Ticket;
use crate::units::{RequestId, Seconds};

/// A request under way.
pub struct Request {
    pub arrival: Seconds,
    /// Distinguishes this request from others in the same place.
    pub serial: u32,
    pub server: u32,
    pub proxy: u32,
    /// How many requests its server had in flight, including this one.
    pub in_flight: u32,
    pub ticket: Option<Ticket>,
}

/// The requests under way, in places that are used again.
#[derive(Default)]
pub struct Requests {
    places: Vec<Request>,
    free: Vec<RequestId>,
    serial: u32,
}

impl Requests {
    /// Adds a request. Returns its place and its serial number.
    pub fn add(&mut self, mut request: Request) -> (RequestId, u32) {
        self.serial = self.serial.wrapping_add(1);
        request.serial = self.serial;
        let id = match self.free.pop() {
            Some(id) => {
                self.places[id as usize] = request;
                id
            }
            None => {
                self.places.push(request);
                (self.places.len() - 1) as RequestId
            }
        };
        (id, self.serial)
    }

    pub fn get(&mut self, id: RequestId) -> &mut Request {
        &mut self.places[id as usize]
    }

    /// Frees the place of a request.
    pub fn free(&mut self, id: RequestId) {
        self.free.push(id);
    }
}
