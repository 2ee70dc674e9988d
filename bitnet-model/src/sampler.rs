//! (in progress)
use crate::Result;
#[derive(Clone,Debug)]
pub struct Sampler;
impl Sampler { pub fn sample(&self,_:&[f32],_:&[u32],_:&[u32],_:&mut impl rand::Rng)->Result<u32>{Ok(0)}}
